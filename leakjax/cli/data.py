"""`leakjax data`: sets prepared on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leakjax.cli.effects import Checked
from leakjax.cli.options import Json
from leakjax.cli.session import session, writable
from leakjax.cli.stdout import answer
from leakjax.errors import InputError
from leakjax.files.whole import write_text

data = typer.Typer(
    name="data",
    help="Data sets prepared on this machine.",
    no_args_is_help=True,
    add_completion=False,
)

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="Where TFDS sets are kept; default: TFDS's own.")
]
Report = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Also write the summary there.")]
Unused = Annotated[int, typer.Option("--seed", help="Without effect here.")]


@data.command("prepare", cls=Checked)
def prepare(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="cifar10, cifar100, mnist, fashion_mnist, svhn, folder:PATH")
    ],
    source: Annotated[
        Path | None, typer.Option("--from", metavar="ARCHIVE_OR_FOLDER", help="The set's files as published.")
    ] = None,
    data_dir: DataDir = None,
    download: Annotated[bool, typer.Option("--download", help="Let tensorflow-datasets download it.")] = False,
    size: Annotated[
        str | None, typer.Option("--size", metavar="H,W", help="With folder:PATH: resize and crop to this.")
    ] = None,
    set_name: Annotated[str | None, typer.Option("--name", help="With folder:PATH: what to call the set.")] = None,
    out: Report = None,
    seed: Unused = 0,
    json_output: Json = False,
) -> None:
    """Prepare a data set once, so that --dataset NAME reads it; nothing is downloaded without --download."""
    del seed
    with session() as console:
        from leakjax.datasets.folders import PREFIX, prepare_folder
        from leakjax.datasets.preparing import prepare as run

        directory = None if out is None else writable(out)
        if name.startswith(PREFIX):
            if source is not None or download:
                raise InputError("--from and --download do not go with folder:PATH, which names its own files")
            result = prepare_folder(name.removeprefix(PREFIX), size, set_name, data_dir)
        else:
            if size is not None or set_name is not None:
                raise InputError("--size and --name go with folder:PATH; the published sets have their own")
            result = run(name, source, data_dir, download=download)
        summary = result._asdict() | {"folder": str(result.folder)}
        _write(directory, "data.json", summary)
        if json_output:
            answer(json.dumps(summary))
        else:
            verb = "wrote" if result.written else "already there:"
            shown = ", ".join(f"{count:,} {split}" for split, count in result.splits.items())
            console.print(f"{verb} {result.folder}: {shown}", highlight=False)
            for split, count in result.missing.items():
                there = result.splits.get(split, 0)
                console.print(f"note: {there:,} {split} images, the published set has {count:,}", highlight=False)
            where = "" if data_dir is None else f" with TFDS_DATA_DIR={data_dir} in the environment"
            console.print(f"read it by --dataset {result.name}{where}", highlight=False)


@data.command("list")
def list_(data_dir: DataDir = None, out: Report = None, seed: Unused = 0, json_output: Json = False) -> None:
    """List the sets that are prepared on this machine."""
    del seed
    with session() as console:
        from leakjax.datasets.prepared import prepared_sets
        from leakjax.datasets.preparing import data_home

        home = data_home(data_dir)
        found = prepared_sets(home)
        _write(None if out is None else writable(out), "data.json", found)
        if json_output:
            answer(json.dumps(found))
        else:
            for name, summary in found.items():
                console.print(f"{name}  {summary}", highlight=False)
            if not found:
                console.print(f"no set is prepared in {home}; see `leakjax data prepare --help`", highlight=False)


def _write(directory: Path | None, file: str, summary: Any) -> None:
    if directory is not None:
        write_text(directory / file, json.dumps(summary, indent=2) + "\n")

"""`python -m benchmarks NAME`: a suite of cases, or one of the studies that measure something of their own.

Suites take the options below. Studies have their own (`python -m benchmarks NAME --help`).
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import asking, plots, runner
from benchmarks.cases import Case
from benchmarks.progress import progress
from benchmarks.records import read_records
from benchmarks.suites import SUITES
from benchmarks.summary import rows, table
from leakjax.errors import InputError
from leakjax.files.whole import write_text

STUDIES = {
    "throughput": "images a second by batch, memory, compilation; the engine against dense least squares",
    "zoo": "reconstructions of the whole zoo, by options",
    "solvers": "every solver of the matching problem on the same gradients",
    "accuracy": "test accuracy after training with each defense, beside what an attack on it still finds",
    "study": "certificates of random networks, judged against the truth",
    "guard": "what the guard of training loops costs",
    "layers": "direct solves of layers beside LSMR, in one run",
    "accelerator": "clients a second of one program a chunk, beside the bounds of the device",
    "sizes": "what an image costs against side, width and clients, counted and measured",
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a suite."""
    listing = "\n".join(f"  {name:14} {s.summary} ({len(s.cases)} images)" for name, s in SUITES.items())
    listing += "\nstudies:\n" + "\n".join(f"  {name:14} {summary}" for name, summary in STUDIES.items())
    parser = asking.Parser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="suites:\n" + listing,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=[*SUITES, *STUDIES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: bench-out/NAME")
    parser.add_argument("--table", type=Path, metavar="DIR|FILE", help="print the table of records, run nothing")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images of each row alone (whole batches)")
    parser.add_argument("--only", default="", metavar="WORD[,WORD..]", help="cases whose keys hold all these words")
    parser.add_argument("--devices", metavar="N|all", help="local devices over which victims are spread")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where processes of one run meet")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="how many processes share the run")
    parser.add_argument("--process", type=int, default=0, metavar="I", help="which of them this is, from 0")
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    return parser.parse_args(words)


def chosen(suite: str, limit: int | None, only: str) -> list[Case]:
    """The cases of a suite that the options leave."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be a positive number of images, got {limit}")
    words = set(filter(None, only.split(",")))
    cases = [case for case in SUITES[suite].cases if words <= set(case.key.split())]
    cases = [case for case in cases if limit is None or case.index < max(limit - limit % case.batch, case.batch)]
    if not cases:
        raise InputError(f"--only {only}: no case of suite {suite!r} has all these words in its key")
    return cases


def run(options: argparse.Namespace) -> None:
    """Run a suite and print its table."""
    cases = chosen(options.suite, options.limit, options.only)
    if options.table is not None:
        print(asking.printed(options.table, lambda records: table(records, cases)), end="")
        return
    if options.processes < 1:
        raise InputError(f"--processes must be a positive number, got {options.processes}")
    if not 0 <= options.process < options.processes:
        raise InputError(f"--process must be in 0..{options.processes - 1}, got {options.process}")
    if options.processes > 1 and options.coordinator is None:
        raise InputError("--processes: name the --coordinator HOST:PORT where they meet, the same for all of them")
    if options.coordinator is not None:
        asking.meet(options.coordinator, options.processes, options.process)
    devices = runner.choose_devices(options.devices)
    out = asking.folder(options.out or Path("bench-out") / options.suite)
    share = {"process": options.process, "processes": options.processes}
    with progress(Console(stderr=True)) as tell:
        runner.run(cases, out, devices=devices, retry=options.retry, tell=tell, **share)
    if options.coordinator is not None:
        runner.gather(out, options.process)
    if options.process == 0:
        records = read_records(out)
        write_text(out / "table.md", table(records, cases))
        plots.write_plots(rows(records, cases), out, f"{options.suite}: {SUITES[options.suite].summary}")
        print(table(records, cases), end="")


def main(words: Sequence[str]) -> None:
    """Run a study or a suite; bad input is one line and exit status 2."""
    with asking.one_line():
        if words and words[0] in STUDIES:
            importlib.import_module(f"benchmarks.{words[0]}").main(words[1:])
            return
        warnings.filterwarnings("ignore", category=UserWarning)
        run(parse(words))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Files are there whole or not at all, whatever the disk does."""

import ast
import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from bad_input import fill, left_in

import leakjax
from leakjax.files import whole as files

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "text": lambda path: files.write_text(path, "néw"),
    "npz": lambda path: files.write_npz(path, {"a": np.ones(3)}),
    "compressed": lambda path: files.write_npz(path, {"a": np.ones(3)}, compressed=True),
}


@pytest.fixture
def full_disk(monkeypatch):
    def fail(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk, write):
    path = tmp_path / "kept.npz"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space") as caught:
        write(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert left_in(tmp_path) == ["kept.npz"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_replaces_another_whole(tmp_path, write):
    path = tmp_path / "file.npz"
    path.write_bytes(b"old" * 1000)
    write(path)
    assert left_in(tmp_path) == ["file.npz"]
    assert b"old" not in path.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def _half(path, error):
    with files.whole_file(path) as file:
        file.write(b"half")
        raise error


def test_whatever_is_raised_leaves_nothing(tmp_path):
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            _half(tmp_path / "new", error)
    assert left_in(tmp_path) == []


def test_links_are_followed_and_devices_written_to(tmp_path):
    (tmp_path / "goal").write_text("old")
    (tmp_path / "link").symlink_to("goal")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "goal").read_text() == "new"
    files.write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space") as caught:
        files.write_text("/dev/full", "too much")
    assert caught.value.filename == "/dev/full"


def test_names_end_as_numpys_do(tmp_path):
    files.write_npz(tmp_path / "a.b", {"x": np.ones(2)})
    assert left_in(tmp_path) == ["a.b.npz"]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_array_may_have_the_name_of_an_argument(tmp_path, compressed):
    """NumPy's own writer takes `file` and, in some versions only, `allow_pickle` for itself."""
    arrays = {"file": np.arange(3), "allow_pickle": np.ones((2, 0)), "params/a": np.float32(2)}
    files.write_npz(tmp_path / "a.npz", arrays, compressed=compressed)
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        files.write_npz(tmp_path / "a.npz", {"a": np.array([None])}, compressed=compressed)
    assert left_in(tmp_path) == ["a.npz"]


WRITE = {"write_text", "write_bytes", "savez", "savez_compressed", "savefig", "tofile"}


def test_no_place_writes_by_itself():
    """Every writer of the package goes through `files`, but for the data sets, which rename whole folders."""
    root = os.path.dirname(leakjax.__file__)
    found = []
    for folder, _, names in os.walk(root):
        for name in (
            n for n in names if n.endswith(".py") and (folder, n) != (os.path.join(root, "files"), "whole.py")
        ):
            with open(os.path.join(folder, name)) as file:
                calls = [n for n in ast.walk(ast.parse(file.read())) if isinstance(n, ast.Call)]
            words = {c.func.attr for c in calls if isinstance(c.func, ast.Attribute)}
            found += [
                name for w in words & {"write_text", "write_bytes", "savez", "savez_compressed", "savefig", "tofile"}
            ]
    assert found == []


MODEL = ("--model", "bad_nets:dense", "--input-shape", "4,4,1", "--images", "small.npz")


@pytest.mark.parametrize(
    ("command", "file", "obstacle"),
    [
        (("capture", *MODEL), "capture.npz", "full"),
        (("capture", *MODEL), "capture.npz", "folder"),
        (("invert", *MODEL), "figure.png", "full"),
        (("invert", *MODEL), "reconstruction.npz", "folder"),
        (("audit", *MODEL), "audit.html", "full"),
        (("audit", *MODEL), "maps.npz", "folder"),
        (("list", "models"), "models.json", "full"),
        (("list", "models"), "models.json", "folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_file_that_cannot_be_written_is_named(run, folder, command, file, obstacle):
    fill(folder)
    place = folder / "out" / file
    if obstacle == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/full")
    result = run(*command, "--out", "out")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert f"out/{file}" in line
    assert not any(name.startswith(".") for name in left_in(folder / "out"))


def test_a_good_capture_survives_a_full_disk(run, folder, full_disk):
    fill(folder)
    (folder / "out" / "capture.npz").write_bytes(b"good")
    result = run("capture", *MODEL, "--out", "out")
    assert result.exit_code == 2
    assert "capture.npz (No space left on device)" in result.stderr
    assert (folder / "out" / "capture.npz").read_bytes() == b"good"
    assert left_in(folder / "out") == ["capture.npz"]


def test_folders_that_stay_empty_are_not_left(run, folder):
    fill(folder)
    assert run("invert", *MODEL, "--index", "9", "--out", "new/and/deep").exit_code == 2
    assert not (folder / "new").exists()
    assert run("invert", *MODEL, "--index", "9", "--out", "out").exit_code == 2
    assert (folder / "out").is_dir()


HERE = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(leakjax.__file__))}


LEAKJAX = (sys.executable, "-m", "leakjax.cli")


def command(folder, *words, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": HERE, **options}
    return subprocess.run([*words], cwd=folder, text=True, timeout=100, **options)


def test_json_alone_is_on_standard_output_while_a_users_code_prints(folder):
    fill(folder)
    result = command(folder, *LEAKJAX, "capture", "--model", "bad_nets:chatty", *MODEL[2:], "--out", "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["victims"] == 1
    for words in ("a factory prints", "a child prints", "a model prints"):
        assert words in result.stderr


def test_a_closed_or_full_standard_output_is_no_traceback(folder):
    fill(folder)
    closed = command(folder, "sh", "-c", 'exec "$@" >&-', "sh", *LEAKJAX, "list", "models")
    assert closed.stderr == ""
    with open("/dev/full", "w") as full:
        result = command(folder, *LEAKJAX, "list", "models", "--json", stdout=full)
    assert result.returncode == 2
    (said,) = result.stderr.splitlines()
    assert "standard output" in said


def test_without_a_home_nothing_is_kept_and_one_line_says_so(folder, tmp_path):
    fill(folder)
    script = (
        "import pwd, sys\n"
        "def absent(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = absent\n"
        "sys.argv[0] = 'leakjax'\n"
        "from leakjax.cli import main\n"
        "main()\n"
    )
    kept = {k: v for k, v in HERE.items() if k not in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")}
    result = command(folder, sys.executable, "-c", script, "capture", *MODEL, "--out", "out", "--json", env=kept)
    assert result.returncode == 0, result.stderr
    (note,) = result.stderr.splitlines()
    assert "compiled programs are not kept" in note
    assert json.loads(result.stdout)["victims"] == 1
    assert not (folder / "~").exists()


@pytest.mark.parametrize("name", ["[red]out", "[/]", ":smile:", "$x_1$", "a]b["])
def test_names_are_printed_as_they_are(run, folder, name):
    fill(folder)
    result = run("capture", *MODEL, "--out", name)
    assert result.exit_code == 0
    assert f"wrote {name}/capture.npz" in result.stderr.replace("\n", "")
    missing = run("invert", *MODEL[:4], "--images", name + ".npz")
    assert f"{name}.npz" in missing.stderr


def test_layers_are_printed_by_their_own_names(run, folder):
    (folder / "odd_names.py").write_text(
        "import numpy as np\n"
        "def odd():\n"
        "    draw = np.random.default_rng(0)\n"
        "    w = np.float32(draw.normal(size=(16, 3)))\n"
        "    return (lambda p, x: x.reshape(x.shape[0], -1) @ p['[/red]']['[bold]w']), {'[/red]': {'[bold]w': w}}\n"
    )
    fill(folder)
    words = ("--model", "odd_names:odd", *MODEL[2:], "--out", "out")
    assert "[/red]" in run("invert", *words).stderr
    assert "[/red]" in run("audit", *words).stderr

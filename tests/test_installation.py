"""What is installed works: at the floors of pyproject.toml, on every Python that is found, and outside the checkout."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from leakjax.models import MODELS
from leakjax.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
README, PAGE = ((ROOT / name).read_text() for name in ("README.md", "docs/install.md"))
COMMANDS = re.findall(r"^pip install [^\n#]*[^\s#]", README, re.MULTILINE)
PYTHONS = ["3.11", "3.12", "3.13"]
EXACT = 200.0  # dB: what `exact` is above by far, on these networks in float64
INHERITED = re.compile(r"PYTHON|LEAKJAX|JAX_|XLA_")  # what tests set for themselves, and a user does not


def floors(requirements):
    """{package: lowest version} of requirements that have the form `name>=version`."""
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)(;.*)?", text) for text in requirements]
    assert all(found), "a requirement has one bound, its floor"
    return {match[1]: match[2] for match in found}


def interpreter(version):
    """The Python of this version that runs the tests, or that is on PATH and starts (a stand-in may not)."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = sys.executable if version == here else shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", "import venv"], capture_output=True).returncode:
        pytest.skip(f"no python{version} on PATH")
    return found


def call(where, *words, **environment):
    """Standard output of a program that succeeds, run in the folder `where` with nothing of the tests' own settings."""
    kept = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
    environment = {**kept, "XDG_CACHE_HOME": str(where / "cache"), **environment}
    # 20 minutes: a slow line brings some 400 MB of wheels
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=where, env=environment, timeout=1200
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@functools.cache
def _reaches_an_index(folder):
    """Whether pip gets what every build of leakjax needs first."""
    words = "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--dest", folder
    done = subprocess.run([sys.executable, *words, *PROJECT["build-system"]["requires"]], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def index(tmp_path_factory):
    if not _reaches_an_index(tmp_path_factory.getbasetemp() / "reached"):
        pytest.skip("pip reaches no package index")


@pytest.fixture
def elsewhere(tmp_path):
    """A folder outside the checkout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert ROOT not in folder.resolve().parents
    return folder


def new_environment(folder, python):
    """The folder of programs of a new virtual environment."""
    subprocess.run([python, "-m", "venv", folder], check=True, timeout=300)
    return folder / "bin"


def check(programs, python, elsewhere, home, **environment):
    """`leakjax` is the one installed below `home`; it names itself and its models, and inverts embedded photos."""

    def leakjax(*words):
        return call(elsewhere, programs / "leakjax", *words, **environment)

    def certificate(name):
        (example,) = json.loads((elsewhere / name / "report.json").read_text())["examples"]
        return example["certificate"]["status"], example["psnr"]

    file = call(elsewhere, python, "-c", "import leakjax; print(leakjax.__file__)", **environment)
    assert home.resolve() in Path(file.strip()).resolve().parents
    assert leakjax("--version").strip() == f"leakjax {__version__}"
    assert "invert" in leakjax("--help")
    listed = leakjax("list", "models")
    assert [name for name in MODELS if not re.search(rf"\b{name}\b", listed)] == []
    leakjax("invert", "--model", "lenet2", "--index", "0", "--out", "inverted")
    status, psnr = certificate("inverted")
    assert status == "exact"
    assert psnr > EXACT
    assert (elsewhere / "inverted" / "figure.png").read_bytes().startswith(b"\x89PNG")
    leakjax("capture", "--model", "cnn2_c1", "--index", "1", "--out", "captured")
    leakjax("invert", "--model", "cnn2_c1", "--capture", "captured/capture.npz", "--out", "of-capture")
    assert certificate("of-capture") == ("exact", None)
    leakjax("audit", "--model", "cnn2_c1", "--shapes-only", "--out", "audited")
    assert "<style>" in (elsewhere / "audited" / "audit.html").read_text()


@pytest.mark.slow
def test_the_floors_work_together(index, tmp_path, elsewhere):
    """With every dependency at its floor, and all else as new as that allows, on the oldest Python."""
    lowest = floors(DEPENDENCIES)
    programs = new_environment(tmp_path / "lowest", interpreter(PYTHONS[0]))
    pinned = {**lowest, "jaxlib": lowest["jax"], **floors(EXTRAS["dp"])}
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
    call(tmp_path, programs / "pip", "install", "--quiet", "--constraint", constraints, f"{ROOT}[dp]")
    frozen = call(tmp_path, programs / "pip", "list", "--format", "json")
    installed = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(frozen)}
    for name, version in pinned.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", installed[name]), name
    check(programs, programs / "python", elsewhere, tmp_path / "lowest")
    noise = "--clip", "1", "--noise-multiplier", "1", "--out", "private"
    call(elsewhere, programs / "leakjax", "audit", "--model", "fcn3", *noise)
    assert "epsilon" in (elsewhere / "private" / "audit.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_commands_of_the_readme_install_on_every_python(index, tmp_path, elsewhere, version):
    """With the newest versions that pip chooses."""
    programs = new_environment(tmp_path / "environment", interpreter(version))
    assert COMMANDS[0] == "pip install ."
    for command in COMMANDS:
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        call(tmp_path, "sh", "-c", f'cd "$1" && {command}', "sh", ROOT, PATH=path, PIP_QUIET="1")
    found = call(tmp_path, programs / "python", "--version")
    assert found.startswith(f"Python {version}.")
    check(programs, programs / "python", elsewhere, tmp_path / "environment")


@pytest.mark.slow
def test_a_wheel_is_whole_and_runs_outside_the_checkout(index, tmp_path, elsewhere):
    """Beside the dependencies of the Python that runs the tests."""
    pip = sys.executable, "-m", "pip"
    call(tmp_path, *pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    files = [p for p in (ROOT / "leakjax").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert names == {p.relative_to(ROOT).as_posix() for p in files}
    assert {"leakjax/py.typed", "leakjax/datasets/samples/32/00_astronaut.png"} <= names
    assert set(re.findall(r"^Provides-Extra: (\S+)", metadata, re.MULTILINE)) == set(EXTRAS)
    site = tmp_path / "site"
    call(tmp_path, *pip, "install", "--quiet", "--no-deps", "--target", site, wheel)
    check(site / "bin", sys.executable, elsewhere, site, PYTHONPATH=str(site))


def test_the_pages_name_the_pythons_the_floors_and_the_extras():
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]},<3.{int(PYTHONS[-1].partition('.')[2]) + 1}"
    for text in (README, PAGE):
        assert f"Python {PYTHONS[0]}, {PYTHONS[1]} or {PYTHONS[2]}" in text
    table = PAGE.split("\n## Versions\n")[1].split("\n## ")[0]
    assert dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", table, re.MULTILINE)) == floors(DEPENDENCIES)
    section = README.split("\n## Installation\n")[1].split("\n## ")[0]
    assert set(EXTRAS) <= set(re.findall(r"`(\w+)`", section))
    assert "(docs/install.md)" in section
    table = PAGE.split("\n## Extras\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(EXTRAS)

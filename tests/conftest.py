"""Strictness for every test: float64, no silent rank promotion, warnings are errors, derandomized property tests."""

import gc
import os
import pathlib
import sys
import tempfile

# Tests compile hundreds of small programs and run each a few times: let XLA spend less on each.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"]
).strip()

# What several tests or workers compile is compiled once: a folder of this run keeps it.
if "LEAKJAX_TEST_PROGRAMS" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="leakjax-programs-")
    os.environ["LEAKJAX_TEST_PROGRAMS"] = _PROGRAMS.name

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from studies import STUDIES
from typer.testing import CliRunner

# Shapes and types of annotations are checked as functions are called, in every room. Front doors check what a caller
# gives by themselves, with an error of their own that tests ask for: they are left out.
FRONT_DOORS = (
    "leakjax.__init__", "leakjax.arguments", "leakjax.reconstruction", "leakjax.preparation", "leakjax.inversion",
    "leakjax.cli", "leakjax.client.observation", "leakjax.client.training", "leakjax.captures", "leakjax.interop",
    "leakjax.datasets", "leakjax.guard.online", "leakjax.leakage.audit", "leakjax.leakage.inputs",
    "leakjax.leakage.directions", "leakjax.models.reader", "leakjax.models.zoo", "leakjax.client.defenses.registry",
    "leakjax.runtime.precision", "leakjax.files", "leakjax.report", "leakjax.leakage.matrix_free",
    "leakjax.leakage.privacy",
)  # fmt: skip
_ROOT = pathlib.Path(__file__).resolve().parents[1] / "leakjax"
CHECKED = [
    module
    for module in (".".join(p.relative_to(_ROOT.parent).with_suffix("").parts) for p in _ROOT.rglob("*.py"))
    if not any(module == door or module.startswith(door + ".") for door in FRONT_DOORS)
]
if os.environ.get("LEAKJAX_CHECK_SHAPES") == "1":  # `make shapes`
    jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ["LEAKJAX_TEST_PROGRAMS"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile(
    "leakjax",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("leakjax")

# Third parties that warn on import or on exit; everything else is an error.
_TOLERATED = (
    "ignore::DeprecationWarning:tensorflow_datasets.*",
    "ignore::DeprecationWarning:pkg_resources.*",
    "ignore:pkg_resources is deprecated:UserWarning",
    "ignore::DeprecationWarning:google.*",
    "ignore::ResourceWarning",
)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    for line in _TOLERATED:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    """The studies are slow; one whose test is gone is an error where its whole file was collected."""
    known = {item.nodeid.rpartition("/")[2]: item for item in items}
    files = {name.partition("::")[0] for name in known}
    whole = not any("::" in argument for argument in sys.argv[1:])
    missing = [name for name in STUDIES if whole and name.partition("::")[0] in files and name not in known]
    if missing:
        raise pytest.UsageError(f"tests/studies.py names tests that are gone: {', '.join(missing)}")
    for name in STUDIES:
        if name in known:
            known[name].add_marker(pytest.mark.slow)


@pytest.fixture
def rng():
    """A generator of its own for each test, always the same."""
    return np.random.default_rng(20240607)


@pytest.fixture
def folder(tmp_path):
    """Where `run` runs; a module may fill it or have its own."""
    return tmp_path


@pytest.fixture
def cache(monkeypatch):
    """No compiled program is kept on disk; a module may keep them in a place of its own."""
    monkeypatch.setattr("leakjax.cli.session.enable_compilation_cache", lambda: None)


@pytest.fixture
def run(folder, cache, monkeypatch):
    """Run a command line in-process, in the folder; what is not an exit of its own is raised."""
    from leakjax.cli import app

    monkeypatch.chdir(folder)
    monkeypatch.setattr("leakjax.cli.progress.EVERY", 1e6)  # seconds: a busy machine has nothing to say
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words):
        result = CliRunner().invoke(app, [str(w) for w in words])
        if result.exit_code == 1:
            raise result.exception
        return result

    return run


MOST_MAPS = 30_000  # a process may have 65,530 on Linux; programs take most of them, and XLA crashes without one
FULL_MAPS = 45_000  # at which the tests of one module that are left may need more than there are
MOST_MEMORY = 3 * 2**30  # bytes of a worker, of which a small machine runs two


def _maps():
    """How many pieces of memory this process has mapped; 0 where it cannot be told."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _crowded():
    """Whether this process holds so many programs that the next ones may find no room; True where it cannot be told."""
    status = pathlib.Path("/proc/self/statm")
    if not status.exists():
        return True
    resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident > MOST_MEMORY or _maps() > MOST_MAPS


def _give_back():
    from leakjax.runtime.programs import clear_caches

    clear_caches()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Compiled programs are given back after a module that leaves many. Not after every test: memory that Python holds
    on to would have them compiled anew for each."""
    yield
    if _crowded():
        _give_back()


@pytest.fixture(autouse=True)
def _room_within_a_module():
    """They are given back within a module where it has nearly all that a process may map."""
    yield
    if _maps() > FULL_MAPS:
        _give_back()

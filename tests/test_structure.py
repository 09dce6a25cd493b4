"""The house rules, over the syntax tree: who may import whom, and that no attack can be handed an image."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "leakjax"
FILES = sorted(ROOT.rglob("*.py"))
FORBIDDEN_PARAMETERS = {"image", "images", "truth", "truths", "original", "originals", "target_image", "x_true"}

# A module's imports of leakjax may never begin with these.
WALLS = {
    "solvers": (
        "segments systems heads attacks inversion observation model models datasets interop report cli metrics "
        "activations reconstruction leakage defenses"
    ),
    "_jaxpr.py": (
        "_convolution segments systems heads attacks inversion observation model models datasets report cli solvers "
        "activations"
    ),
    "_convolution.py": (
        "segments systems heads attacks inversion observation model models datasets report cli solvers activations"
    ),
    "activations.py": "segments systems heads attacks inversion observation model models datasets report cli solvers",
    "losses.py": "segments systems heads attacks inversion observation models datasets report cli solvers",
    "segments.py": "systems heads attacks inversion observation models datasets report cli solvers metrics",
    "systems.py": "heads attacks inversion observation models datasets report cli metrics",
    "_primitives.py": (
        "_jaxpr _convolution segments systems heads attacks inversion observation model models datasets report cli "
        "solvers activations"
    ),
    "side_by_side.py": "segments systems heads attacks inversion observation model models datasets report cli solvers",
    "batch_heads.py": "attacks inversion observation models datasets report cli metrics",
    "heads.py": "attacks inversion observation models datasets report cli metrics",
    "attacks": "observation inversion models datasets interop report cli metrics leakage captures",
    "observation.py": "attacks inversion heads systems segments solvers datasets report cli metrics models",
    "inversion.py": "models datasets interop report cli metrics captures",
    "models": "attacks inversion heads systems segments solvers datasets report cli metrics observation",
    "datasets": "attacks inversion heads systems segments solvers report cli metrics observation model",
    "interop": "attacks inversion heads systems solvers datasets report cli metrics",
    "metrics.py": "attacks inversion heads systems segments solvers datasets report cli observation models",
    "defenses": "attacks inversion heads systems solvers datasets report cli models observation",
    "client.py": "attacks inversion heads systems solvers datasets report cli models observation",
    "leakage": "attacks inversion datasets report cli models",
    "report": "cli",
}


DRAWS_ITSELF = ("leakage/result.py", "leakjax.report.audit_page")  # Audit.to_html, imported when asked


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Every module name that a file imports, at any depth, as dotted names (`from a import b` gives a and a.b)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("leakjax", *path.relative_to(ROOT).parts[:-1])
                base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def begins(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def under(path, place):
    return name_of(path) == place or name_of(path).startswith(place + "/")


def attributes(path):
    """Dotted attribute chains such as jax.extend.core."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}


def test_the_walk_sees_the_package():
    names = {name_of(path) for path in FILES}
    assert {"_jaxpr.py", "model.py", "heads.py", "inversion.py", "solvers/lsmr.py", "attacks/rgap.py"} <= names
    assert "jax.extend.core" in imports(ROOT / "_jaxpr.py")
    assert "flax.nnx" in imports(ROOT / "model.py")
    assert "leakjax.segments" in imports(ROOT / "systems.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_module_alone_touches_jaxs_internals(path):
    used = {m for m in imports(path) | attributes(path) if begins(m, "jax.extend") or begins(m, "jax.core")}
    assert not used or name_of(path) == "_jaxpr.py"
    assert not any(begins(m, "jax._src") for m in imports(path) | attributes(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_flax_is_known_to_the_reader_and_the_zoo_alone(path):
    flax = [m for m in imports(path) if begins(m, "flax")]
    assert not flax or name_of(path) == "model.py" or under(path, "models")


@pytest.mark.parametrize("place", WALLS)
def test_imports_flow_one_way(place):
    for path in FILES:
        if under(path, place):
            for wall in WALLS[place].split():
                crossed = [m for m in imports(path) if begins(m, f"leakjax.{wall}")]
                crossed = [m for m in crossed if name_of(path) != DRAWS_ITSELF[0] or not begins(m, DRAWS_ITSELF[1])]
                assert not crossed, f"{name_of(path)} imports {crossed}"


def test_modules_do_not_import_each_other_in_circles():
    """Imports at the top of modules, the package's own root aside, form no cycle."""
    modules = {"leakjax." + name_of(p)[:-3].replace("/", ".").removesuffix(".__init__"): p for p in FILES}
    edges = {}
    for module, path in modules.items():
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and n.module]
        names = {n.module for n in top} | {f"{n.module}.{a.name}" for n in top for a in n.names}
        edges[module] = {m for m in names if m in modules and m not in (module, "leakjax")}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(edges[module]):
                if not module.startswith(other + "."):  # a package's __init__ may collect its members
                    visit(other)
            path.pop()
            done.add(module)

    for module in sorted(modules):
        visit(module)
    assert len(done) == len(modules)


BLIND = [p for p in FILES if under(p, "attacks") or under(p, "solvers") or name_of(p) in ("heads.py", "inversion.py")]


def parameters(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            a = node.args
            names = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            yield getattr(node, "name", "lambda"), {n.arg for n in names}


@pytest.mark.parametrize("path", BLIND, ids=name_of)
def test_no_attack_takes_an_image(path):
    for name, arguments in parameters(path):
        assert not arguments & FORBIDDEN_PARAMETERS, f"{name_of(path)}: {name} takes {arguments & FORBIDDEN_PARAMETERS}"


def test_what_attacks_start_from_holds_no_image():
    for file, wanted in (("attacks/problem.py", "Problem"), ("observation.py", "Observation")):
        tree = ast.parse((ROOT / file).read_text())
        (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == wanted]
        fields = {n.target.id for n in found.body if isinstance(n, ast.AnnAssign)}
        assert "gradients" in fields
        assert not fields & FORBIDDEN_PARAMETERS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_configured_or_seeded_globally(path):
    """No module changes JAX's settings or numpy's global generator, and none prints but the command line."""
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert not calls & {"np.random.seed", "numpy.random.seed", "random.seed"}
    if name_of(path) not in ("cli.py", "__main__.py") and not name_of(path).startswith("cli/"):
        assert "jax.config.update" not in calls
        assert "print" not in calls or under(path, "report") or "/_make" in name_of(path)

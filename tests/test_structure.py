"""The house rules, over the syntax tree: who may import whom, and that no attack can be handed an image."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "leakjax"
FILES = sorted(ROOT.rglob("*.py"))
FORBIDDEN_PARAMETERS = {"image", "images", "truth", "truths", "original", "originals", "target_image", "x_true"}

# The rooms of the house, bottom up: whoever is in one imports from it and from those before it, and from no other.
ROOMS = [
    "version.py",
    "errors.py",
    "arguments.py",
    "reconstruction.py",
    "metrics.py",
    "runtime",
    "solvers",
    "files",
    "models",
    "datasets",
    "segments/tracing",
    "segments",
    "constraints",
    "client",
    "captures",
    "guard",
    "interop",
    "attacks/tolerances.py",
    "attacks/problem.py",
    "attacks/adaptive.py",
    "attacks/candidates.py",
    "attacks/heads",
    "attacks/certificates",
    "attacks/layerwise",
    "attacks/matching",
    "attacks/sequences",
    "attacks",
    "report",
    "leakage",
    "preparation.py",
    "assembly.py",
    "inversion.py",
    "planning.py",
    "sequences.py",
    "activations.py",
    "residuals.py",
    "systems.py",
    "cli",
    "__init__.py",
]


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
    assert {"models/reader.py", "inversion.py", "solvers/lsmr.py", "attacks/layerwise/rgap.py"} <= names
    assert "jax.extend.core" in imports(ROOT / "segments/tracing/jaxprs.py")
    assert "flax.nnx" in imports(ROOT / "models/families.py")
    assert "leakjax.segments.chain" in imports(ROOT / "constraints/layer.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_module_alone_touches_jaxs_internals(path):
    used = {m for m in imports(path) | attributes(path) if begins(m, "jax.extend") or begins(m, "jax.core")}
    assert not used or name_of(path) == "segments/tracing/jaxprs.py"
    assert not any(begins(m, "jax._src") for m in imports(path) | attributes(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_flax_is_known_to_the_reader_and_the_zoo_alone(path):
    flax = [m for m in imports(path) if begins(m, "flax")]
    assert not flax or under(path, "models")


def room_of(path):
    """The place of a file's room in `ROOMS`: the innermost folder, or the file, that is named there."""
    places = [path.relative_to(ROOT), *path.relative_to(ROOT).parents]
    return next(ROOMS.index(place.as_posix()) for place in places if place.as_posix() in ROOMS)


def modules():
    return {"leakjax." + name_of(p)[:-3].replace("/", ".").removesuffix(".__init__"): p for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_is_in_a_room_and_imports_only_from_those_below(path):
    """A module in no room fails, as does an import upward, at the top of a module or inside a function.

    A package's `__init__` stands above its own rooms: it collects their members.
    """
    places, here = modules(), room_of(path)
    for module in imports(path) & set(places):
        if module == "leakjax" or name_of(places[module]) == "__init__.py":
            continue
        assert room_of(places[module]) <= here, f"{name_of(path)} imports {module}, which is above it"


def test_modules_do_not_import_each_other_in_circles():
    """Imports at the top of modules, the package's own root aside, form no cycle."""
    places, edges = modules(), {}
    for module, path in places.items():
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ImportFrom) and n.module]
        names = {n.module for n in top} | {f"{n.module}.{a.name}" for n in top for a in n.names}
        edges[module] = {m for m in names if m in places and m not in (module, "leakjax")}
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

    for module in sorted(places):
        visit(module)
    assert len(done) == len(places)


FRONT = "preparation.py", "assembly.py", "inversion.py"
BLIND = [p for p in FILES if under(p, "attacks") or under(p, "solvers") or name_of(p) in FRONT]


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
    for file, wanted in (("attacks/problem.py", "Problem"), ("client/observation.py", "Observation")):
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


def records():
    """By module, the records that it defines or imports: {name: fields}."""
    own, seen = {}, {}
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        own[module] = {n.name: [b for b in n.body if isinstance(b, ast.AnnAssign)] for n in classes}
        seen[module] = tree
    for module, tree in seen.items():
        found = dict(own[module])
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and n.module in own:
                found |= {a.asname or a.name: own[n.module][a.name] for a in n.names if a.name in own[n.module]}
        yield module, tree, {name for name, fields in found.items() if len(fields) > 4}


def test_records_of_many_fields_are_built_by_keyword():
    """Nobody counts arguments: whoever builds a record of more than four fields from more than four names them."""
    found, many = 0, []
    for module, tree, names in records():
        for n in ast.walk(tree):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names:
                found += 1
                many += [f"{module}:{n.lineno}"] if len(n.args) > 4 else []
    assert found > 50
    assert not many


def test_no_room_but_the_defenses_asks_for_a_defense_by_name():
    """Adding a defense touches its table alone: attacks ask what a server makes of it."""
    names = {"clip", "dp_sgd", "gaussian", "laplace", "qsgd", "soteria", "top_k"}
    found = []
    for path in FILES:
        if under(path, "client/defenses") or under(path, "cli") or under(path, "leakage") or under(path, "report"):
            continue
        compared = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Compare)]
        words = {c.value for n in compared for c in ast.walk(n) if isinstance(c, ast.Constant)}
        found += [name_of(path)] if words & names else []
    assert not found

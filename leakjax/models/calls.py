"""How a model is called: with which arguments and random keys, which of its outputs counts, in which order of axes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from leakjax.arguments import choice, shown, whole
from leakjax.errors import InputError

Layout = Literal["NHWC", "NCHW"]
LAYOUTS = ("NHWC", "NCHW")
"""Orders of axes in which a model may take a batch; images are (N, H, W, C) everywhere else."""

Path = str | int | Sequence[str | int]


class Call(NamedTuple):
    """`model(x, **arguments)` with the keys of `rngs`, of which the output at `path` counts.

    - `arguments`: keyword arguments beside x;
    - `rngs`: a key for each random stream, by name; () where none was given;
    - `path`: indices, names of fields or keys, outermost first; () where the model returns one array;
    - `layout`: the order of axes of x, as the model takes it;
    - `train`: whether in training mode; None for the model as it is.
    """

    arguments: tuple[tuple[str, Any], ...] = ()
    rngs: tuple[tuple[str, int], ...] = ()
    path: tuple[str | int, ...] = ()
    layout: Layout = "NHWC"
    train: bool | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What another call has to be equal in to be the same: True is not 1 here."""
        return tuple((name, type(value), value) for name, value in self.arguments), *self[1:]

    def in_mode(self, function: Callable[..., Any]) -> "Call":
        """The call with the mode as an argument, as far as `function` takes one and none was given.

        Raises `InputError` where a mode was asked for and `function` has no argument for it.
        """
        if self.train is None:
            return self
        try:
            names = inspect.signature(function).parameters
        except ValueError:  # a callable that does not say what it takes
            names = {}
        asked = {name: self.train != inverted for name, inverted in _MODES.items() if name in names}
        if not asked:
            raise InputError(
                f"train: the model takes no argument {', '.join(_MODES)}; say how it is called (call=..., --call)"
            )
        return self._replace(arguments=tuple({**asked, **dict(self.arguments)}.items()))

    def keys(self) -> dict[str, Any]:
        """The random keys by stream."""
        return {name: jax.random.key(seed) for name, seed in self.rngs}

    def run(self, function: Callable[..., Any], x: Any) -> Any:
        """The output that counts of `function(x, **arguments)`, classes or channels last."""
        return self.run_with_state(lambda x, **arguments: (function(x, **arguments), None), x)[0]

    def run_with_state(self, function: Callable[..., tuple[Any, Any]], x: Any) -> tuple[Any, Any]:
        """`run` of a function that returns its state as well, and that state."""
        taken = jnp.moveaxis(x, -1, 1) if self.layout == "NCHW" else x
        outputs, state = function(taken, **dict(self.arguments))
        found = _at(outputs, self.path)
        maps = self.layout == "NCHW" and getattr(found, "ndim", 0) == x.ndim > 2
        return jnp.moveaxis(found, 1, -1) if maps else found, state

    @property
    def known_keys(self) -> bool:
        """Whether what a model draws is known: its seeds, or keys among its arguments, were given."""
        return bool(self.rngs) or any(_is_key(value) for _, value in self.arguments)


PLAIN = Call()

_MODES = {"train": False, "training": False, "is_training": False, "deterministic": True, "use_running_average": True}
"""Names that models give the argument that says their mode; whether it is True in evaluation mode."""


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key)) or (value.dtype == np.uint32 and value.shape == (2,))


def read_call(
    call: Mapping[str, Any] | None,
    rngs: Mapping[str, int] | int | None,
    output: Path | None,
    layout: str,
    train: bool | None = None,
) -> Call:
    """The five arguments of `read_model`, checked.

    Raises `InputError` for a `call` that is no mapping by names, `rngs` that are no seeds, an `output` that is no path,
    an unknown `layout`, or a `train` that is no truth value.
    """
    if call is not None and not (isinstance(call, Mapping) and all(isinstance(name, str) for name in call)):
        raise InputError(f'call must be keyword arguments by name, like {{"train": False}}, got {shown(call)}')
    if rngs is None or isinstance(rngs, Mapping):
        streams = tuple((_stream(name), _seed(f"rngs[{name!r}]", seed)) for name, seed in (rngs or {}).items())
    else:
        streams = (("params", _seed("rngs", rngs)),)
    choice("layout", layout, LAYOUTS)
    if not (train is None or isinstance(train, bool | np.bool_)):
        raise InputError(f"train must be True, False, or None for the model as it is, got {shown(train)}")
    given = tuple((call or {}).items())
    mode = None if train is None else bool(train)
    path = () if output is None else _path(output)
    return Call(arguments=given, rngs=streams, path=path, layout=layout, train=mode)  # pyright: ignore[reportArgumentType]


def _stream(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f'rngs must be seeds by name of their streams, like {{"dropout": 0}}, got {shown(name)}')
    return name


def _seed(name: str, seed: Any) -> int:
    return whole(name, seed, 0, 2**32 - 1, "a seed, a whole number below 2**32")


def _path(output: Any) -> tuple[str | int, ...]:
    parts = [output] if isinstance(output, str | int | np.integer) else output
    good = isinstance(parts, Sequence) and not isinstance(parts, bytes)
    good = good and all(isinstance(p, str | int | np.integer) and not isinstance(p, bool) and p != "" for p in parts)
    if not good or not parts:
        raise InputError(f'output must be an index, a name, or a path of both, like (0, "logits"), got {shown(output)}')
    return tuple(p if isinstance(p, str) else int(p) for p in parts)


def _at(found: Any, path: tuple[str | int, ...]) -> Any:
    for depth, part in enumerate(path):
        if hasattr(found, "dtype"):
            raise InputError(f"output {part!r} of an array of shape {tuple(found.shape)}: the path is too long")
        try:
            inside = found[part] if isinstance(part, int) or isinstance(found, Mapping) else getattr(found, part)
            if callable(inside):
                raise AttributeError(part)  # a method of the container
        except Exception:
            where = "".join(f"[{p!r}]" for p in path[:depth])
            raise InputError(f"output {part!r} is not among what the model returns{where}: {listed(found)}") from None
        found = inside
    return found


def listed(found: Any) -> str:
    """What a model returned, each array by the path that `output` takes, and its shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    named = [(_name(keys), leaf) for keys, leaf in leaves if hasattr(leaf, "shape")][:_LISTED]
    if named and all(name for name, _ in named):
        return ", ".join(f"output={name} {tuple(leaf.shape)}" for name, leaf in named)
    return f"a {type(found).__name__}"


_LISTED = 6


def _name(keys: Sequence[Any]) -> str:
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in keys]
    return repr(parts[0]) if len(parts) == 1 else repr(tuple(parts)) if parts else ""

"""What the tables of bad input share: small models, small files, and what a refusal looks like."""

import numpy as np

NETS = '''
import os

import jax
import jax.numpy as jnp
import numpy as np


def _weights(outputs=3):
    draw = np.random.default_rng(0)
    return {"w": np.float32(draw.normal(size=(16, 8))), "v": np.float32(draw.normal(size=(8, outputs)))}


def dense():
    """16 pixels, 8 units, 3 logits."""
    return (lambda p, x: jnp.tanh(x.reshape(x.shape[0], -1) @ p["w"]) @ p["v"]), _weights()


def gray():
    """The same for 8x8 images."""
    draw = np.random.default_rng(0)
    return (lambda p, x: x.reshape(x.shape[0], -1) @ p["w"]), {"w": np.float32(0.1 * draw.normal(size=(64, 10)))}


def chatty():
    """Prints where it can, in Python and below."""
    print("a factory prints")
    os.system("echo a child prints")

    def apply(p, x):
        print("a model prints")
        return dense()[0](p, x)

    return apply, _weights()


def with_aux():
    return (lambda p, x: (dense()[0](p, x), x)), _weights()


def with_dict():
    return (lambda p, x: {"logits": dense()[0](p, x)}), _weights()


def with_if():
    def apply(p, x):
        return dense()[0](p, x) if x.sum() > 0 else dense()[0](p, -x)

    return apply, _weights()


def with_numpy():
    return (lambda p, x: jnp.asarray(np.asarray(x).reshape(x.shape[0], -1)) @ p["w"]), _weights()


def with_exit():
    def apply(p, x):
        raise SystemExit(5)

    return apply, _weights()


def with_blank():
    def apply(p, x):
        raise ValueError

    return apply, _weights()


def with_lines():
    def apply(p, x):
        raise RuntimeError("first line\\n[red]second[/] line")

    return apply, _weights()


def constant():
    return (lambda p, x: jnp.broadcast_to(p["v"].sum(0), (x.shape[0], 3))), {"v": _weights()["v"]}


def flat():
    return (lambda p, x: dense()[0](p, x).sum(axis=1)), _weights()


def one_number():
    return (lambda p, x: dense()[0](p, x).sum()), _weights()


def no_params():
    return (lambda p, x: x.reshape(x.shape[0], -1)), {}


def text_params():
    return (lambda p, x: x.reshape(x.shape[0], -1)), {"w": "words"}


def int_params():
    return (lambda p, x: x.reshape(x.shape[0], -1) @ p["w"]), {"w": np.ones((16, 3), int)}


def complex_params():
    return (lambda p, x: x.reshape(x.shape[0], -1) @ p["w"]), {"w": np.ones((16, 3), complex)}


def ragged_params():
    return (lambda p, x: x), {"w": [[1.0, 2.0], [3.0]], "v": object()}


def mixed_keys():
    return (lambda p, x: x), {"w": np.ones(3), 3: np.ones(3)}


def bare_function():
    return lambda p, x: x


def text():
    return "dense"


def triple():
    return dense()[0], _weights(), 3


def nothing():
    return None


def a_class():
    return dict


def raises_key():
    raise KeyError("[/]")


def raises_base():
    raise BaseException("not even an Exception")


def raises_exit():
    raise SystemExit(3)


def raises_assert():
    assert False


def raises_deep():
    return raises_deep()


def needs(more):
    return more


number = 3
'''


def fill(folder):
    """The models and the images that the tables speak of."""
    (folder / "bad_nets.py").write_text(NETS)
    (folder / "bad_syntax.py").write_text("def f(:\n")
    (folder / "bad_import.py").write_text("import a_module_that_is_not_there\n")
    (folder / "bad_exit.py").write_text("raise SystemExit(9)\n")
    draw = np.random.default_rng(7)
    images = draw.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    np.savez(folder / "small.npz", images=images, labels=np.array([2, 0, 1]))
    (folder / "file").touch()
    (folder / "out").mkdir()


def says(line, word):
    """Whether a line of error names what is wrong: an option, or the argument that it stands for."""
    return word in line or word.lstrip("-").replace("-", "_") in line


def left_in(folder):
    """What stands in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


WRONG_MODELS = [
    "with_aux",
    "with_dict",
    "with_if",
    "with_numpy",
    "with_exit",
    "with_blank",
    "with_lines",
    "flat",
    "one_number",
    "no_params",
    "text_params",
    "int_params",
    "complex_params",
    "ragged_params",
    "bare_function",
    "text",
    "triple",
    "nothing",
    "a_class",
    "raises_key",
    "raises_base",
    "raises_exit",
    "raises_assert",
    "raises_deep",
    "needs",
    "mixed_keys",
]
"""Factories of `NETS` whose models no command can take."""

"""Run the Python blocks of pages: `python run_pages.py PLAN.json`, a list of [page, title, code].

The blocks of one page share their names, in order. A block whose title is a file's name is written to that file first;
one that belongs in a PyTorch program runs with a stand-in for `net`, made of the page's own model and gradient.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np

PYTORCH = "PyTorch"


class Tensor:
    """As much of a tensor as writing a capture needs."""

    def __init__(self, array, grad=None):
        self.array, self.grad = np.asarray(array), None if grad is None else Tensor(grad)

    def cpu(self):
        return self

    def numpy(self):
        return self.array


class Module:
    """A convolution and a dense head in PyTorch's layout, as torch.nn.Module names and lists them."""

    def __init__(self, params, gradient):
        self.tensors = {}
        for layer in ("conv", "head"):
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                pair = (_as_torch(np.asarray(a[f"{layer}/{leaf}"])) for a in (params, gradient))
                self.tensors[f"{layer}.{name}"] = Tensor(*pair)

    def state_dict(self):
        return self.tensors

    def named_parameters(self):
        return list(self.tensors.items())


def _as_torch(a):
    """HWIO to OIHW; (in, out) over a flattening with channels last to (out, in) over one with channels first."""
    if a.ndim == 4:
        return a.transpose(3, 2, 0, 1)
    if a.ndim == 2:
        return a.reshape(4, 4, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1)
    return a


def main(plan):
    names = {}
    for page, title, code in json.loads(Path(plan).read_text()):
        here = names.setdefault(page, {"__name__": page})
        file = title.partition('"')[2].rpartition('"')[0]
        if file.endswith(".py"):
            Path(file).write_text(code)
        if PYTORCH in file:
            here |= {"net": Module(here["model"].params, here["sent"]), "numpy": np, "json": json}
        try:
            exec(compile(code, f"{page} ({title or 'block'})", "exec"), here)
        except BaseException:
            traceback.print_exc()
            sys.exit(f"{page}: this block fails:\n{code}")
        print("ran", page, f"{time.process_time():.1f} CPU s so far", flush=True)


main(sys.argv[1])

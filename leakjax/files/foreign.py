"""Files that are no npz file: which kind they are, and how to make one of them."""

import os
from collections.abc import Collection

_TORCH = (
    "write a capture in PyTorch by: "
    'arrays = {f"param/{n}": t.cpu().numpy() for n, t in model.state_dict().items()}; '
    'arrays |= {f"grad/{n}": p.grad.cpu().numpy() for n, p in model.named_parameters()}; '
    'numpy.savez("capture.npz", names=list(model.state_dict()), meta=json.dumps({"loss": "softmax_cross_entropy", '
    '"input_shape": [H, W, C], "input_range": [0, 1]}), **arrays)'
)

_BEGINNINGS = (
    (b"\x93NUMPY", "it is a single array; an npz file is expected: numpy.savez writes several arrays by name"),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file; write the arrays with numpy.savez"),
    (b"\x1f\x8b", "it is compressed by gzip; unpack it, or write the arrays with numpy.savez_compressed"),
    (b"\x89PNG", "it is a picture; write images and labels with numpy.savez(file, images=images, labels=labels)"),
    (b"\xff\xd8\xff", "it is a picture; write images and labels with numpy.savez(file, images=images, labels=labels)"),
    (b"\x80", f"it is a pickle (an old .pt file of PyTorch, or Python's own), which is never opened; {_TORCH}"),
)


def what_it_is(path: str | os.PathLike, members: Collection[str] = ()) -> str | None:
    """What the file at `path` is if it is no npz file, and the remedy; None where that cannot be told.

    Arguments: `members`, the names in it where it is a zip archive.
    """
    if any(name.rpartition("/")[2] in ("data.pkl", "constants.pkl") for name in members):
        return f"it is a .pt file of PyTorch, which holds pickled objects and is never opened; {_TORCH}"
    with open(path, "rb") as file:
        begin = file.read(512)
    if not begin:
        return "it is empty, not an npz file; write it again"
    if begin[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return None
    if len(begin) > 8 and begin[8:9] == b"{" and 2 <= int.from_bytes(begin[:8], "little") < 2**28:
        return f"it is a .safetensors file; {_TORCH}"
    for start, words in _BEGINNINGS:
        if begin.startswith(start):
            return words
    kind = "text" if b"\0" not in begin else "unknown bytes"
    return f"it holds {kind}, it is not an npz file; write the arrays with numpy.savez(FILE, name=array, ...)"

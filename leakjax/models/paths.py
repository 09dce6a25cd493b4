"""Names of arrays, as frameworks write them: "conv1/kernel" in JAX, "conv1.weight" in PyTorch."""


def owner(path: str) -> str:
    """The module that holds an array, "" for one that stands alone."""
    return path.rpartition(separator(path))[0]


def leaf(path: str) -> str:
    """The name of an array within its module."""
    return path.rpartition(separator(path))[2]


def separator(path: str) -> str:
    """What stands between the modules of a path: a dot where there is no slash."""
    return "/" if "/" in path else "."

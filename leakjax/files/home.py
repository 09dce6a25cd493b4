"""Where this user's files are kept between runs; in a container there may be no such place."""

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder `name` in leakjax's cache: below $XDG_CACHE_HOME or ~/.cache; None where neither is known."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "leakjax" / name if os.path.isabs(root) else None

"""Compiled programs are kept between runs, where this user has a place for them."""

import os
import sys
import tempfile
from pathlib import Path

from leakjax.files.home import user_cache


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user's own settings say otherwise.

    Without a home directory that can be written, as in some containers, nothing is kept, and one line says so.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    place = user_cache("xla")
    if place is None or not _can_be_written(place):
        print(
            "leakjax: note: no home directory that can be written: compiled programs are not kept; "
            "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR names a folder for them",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _can_be_written(place: Path) -> bool:
    try:
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return True
    except (OSError, ValueError):
        return False

"""Whether a computation fits into memory, asked before it starts, of the device that will do it."""

import os
from typing import Any

import jax


def available_bytes(device: Any = None) -> int:
    """Memory that is free for new work, in bytes: of an accelerator, where `device` is one, or of this machine."""
    stats = None if device is None or device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def working_device() -> Any:
    """The device that computes unless another is named: JAX's default device."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def fits_in_memory(needed: int) -> bool:
    """Whether `needed` bytes fit with a fifth to spare, on the device that works and on this machine.

    What a device computes comes back to this machine, where matrices of ranks are decomposed.
    """
    return needed < 0.8 * min(available_bytes(working_device()), available_bytes())


def fits_on_host(needed: int) -> bool:
    """Whether `needed` bytes fit into this machine's memory with a fifth to spare; no device is asked."""
    return needed < 0.8 * available_bytes()

"""Whether a computation fits into memory, asked before it starts."""

import os


def available_bytes() -> int:
    """Memory that this machine has free for new work, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits_in_memory(needed: int) -> bool:
    """Whether `needed` bytes fit with a fifth to spare."""
    return needed < 0.8 * available_bytes()

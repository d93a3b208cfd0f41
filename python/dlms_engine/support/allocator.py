"""Memory that stays with the process while a network is run again and again on the CPU.

glibc hands a large block back to the system when it is freed, and the next layer gets it anew, every
page of it faulted in and zeroed: up to a third of the time of a network whose
activations are some megabytes (``dlms bench allocator``). Kept, a block costs that once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .forks import per_process

# mallopt's parameters (malloc.h)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}
_USUAL = {
    _MMAP_MAX: 65536,
    _TOP_PAD: 128 << 10,
    # where glibc's own thresholds, which cannot be made to adapt again, are soon led by large tensors
    _MMAP_THRESHOLD: 32 << 20,
    _TRIM_THRESHOLD: 64 << 20,
}
_OWN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")


class _Users:
    """How many runs of the process are inside, and the lock that the number is changed under."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        per_process(self)

    def renew(self) -> None:
        """The number stays: the thread that forked may be inside, and leaves in the child too."""
        self.lock = threading.Lock()


_users = _Users()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory is kept for what comes next; at the end of the outermost it is given back.

    It holds for the process, all threads of it. Nothing happens where the C library is not glibc, or
    where the environment says how glibc is to allocate (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    library = _glibc()
    if library is None:
        yield
        return
    with _users.lock:
        _users.inside += 1
        if _users.inside == 1:
            _set(library, _KEPT)
    try:
        yield
    finally:
        with _users.lock:
            _users.inside -= 1
            if not _users.inside:
                _set(library, _USUAL)
                library.malloc_trim(ctypes.c_size_t(0))


def _glibc() -> ctypes.CDLL | None:
    if any(name in os.environ for name in _OWN) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version, library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows takes no None
        return None
    return library


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(option, value)

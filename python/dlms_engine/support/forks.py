"""What a forked child may not take over: locks that another thread held, and handles of a device."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol


class PerProcess(Protocol):
    """Holds locks, loops or graphs that belong to one process."""

    def renew(self) -> None:
        """Empty, with new locks; called in a child, where no other thread runs."""
        ...


_living: weakref.WeakSet[Any] = weakref.WeakSet()
_guard = threading.Lock()


def per_process(holder: PerProcess) -> None:
    """Has ``holder.renew()`` called in every child that is forked while it lives.

    A child has the thread that forked and no other: a lock that another one held would never be free.
    """
    with _guard:
        _living.add(holder)


def _renew() -> None:
    _guard.release()
    for holder in list(_living):
        holder.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_renew
    )

"""Whether long runs below a command show a bar of their own, without an argument through every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN: ContextVar[bool] = ContextVar("dlms_engine_progress", default=False)


@contextmanager
def inner_progress(shown: bool) -> Iterator[None]:
    """Within the block the exact solutions of a validation show their evaluations."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def inner_progress_shown() -> bool:
    """What the innermost ``inner_progress`` said; False outside of any."""
    return _SHOWN.get()

"""Arguments that had another name before."""

from __future__ import annotations

from typing import TypeVar

_T = TypeVar("_T")


def one_of_two(conditions: _T, cond: _T) -> _T:
    """``conditions``, or ``cond`` where they were given by that name.

    Raises:
        ValueError: both are given.
    """
    if conditions is not None and cond is not None:
        raise ValueError("conditions and cond are two names of one argument: give one of them")
    return cond if conditions is None else conditions

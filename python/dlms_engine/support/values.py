"""Values that callers give, whatever their annotation says."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Mapping
from typing import Any


def is_finite_number(value: object) -> bool:
    """Whether ``value`` is a real number and finite; a tensor or a text is none."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def json_number(value: Any) -> Any:
    """``value``, or None for a float that is not finite, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_value(value: Any) -> Any:
    """``value`` with numbers that JSON does not have as None and paths as text, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): json_value(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(held) for held in value]
    return str(value) if isinstance(value, os.PathLike) else json_number(value)


def require_finite(value: float, what: str) -> float:
    """``value``, a measured error called ``what``.

    Raises:
        FloatingPointError: it is not finite; names the likely causes.
    """
    if math.isfinite(value):
        return value
    raise FloatingPointError(
        f"{what} is {value}: the network's outputs are not finite (its dtype, its prediction type, the "
        "ends of the time range); dlms_engine.Sampler on a handcrafted solver shows where"
    )


def whole_number(value: object, name: str, least: int = 1) -> int:
    """``value``, an integer of any kind (numpy's too), as Python's.

    Raises:
        ValueError: it is none, or below ``least``.
    """
    whole = _index(value)
    if whole is None or whole < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return whole


def seed_number(value: object) -> int:
    """``value``, a seed, as Python's integer.

    Raises:
        ValueError: it is no integer, or none that a generator takes.
    """
    whole = _index(value)
    if whole is None or not 0 <= whole < 1 << 64:
        raise ValueError(f"seed is {value!r}, expected an integer 0 to 2^64 - 1")
    return whole


def _index(value: object) -> int | None:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None

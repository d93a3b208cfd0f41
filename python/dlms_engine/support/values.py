"""Values that callers give, whatever their annotation says."""

from __future__ import annotations

import math
import numbers


def is_finite_number(value: object) -> bool:
    """Whether ``value`` is a real number and finite; a tensor or a text is none."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


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

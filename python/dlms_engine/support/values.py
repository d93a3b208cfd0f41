"""Values that callers give, whatever their annotation says."""

from __future__ import annotations

import math
import numbers


def is_finite_number(value: object) -> bool:
    """Whether ``value`` is a real number and finite; a tensor or a text is none."""
    return isinstance(value, numbers.Real) and math.isfinite(value)

"""The interface of a noise process; the processes themselves are in ``processes``."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


def as_float64(value: Tensor | Sequence[float] | float) -> Tensor:
    """``value`` as a float64 tensor; keeps device and autograd graph.

    Numbers, sequences and arrays go to the CPU whatever torch's default device is.
    """
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    if any(step < 0 for step in getattr(value, "strides", ())):
        value = value.copy()  # type: ignore[union-attr]  # a reversed array, which torch refuses
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def as_level(value: Tensor | Sequence[float] | float) -> Tensor:
    """``as_float64`` of a time or of sigma / alpha.

    Raises:
        ValueError: a plain number is negative or NaN (tensors are not looked at: they may lie on a
            GPU).
    """
    level = as_float64(value)
    if not isinstance(value, Tensor) and not bool((level >= 0).all()):
        raise ValueError(f"a time or noise level is {value!r}, expected numbers >= 0")
    return level


def config_summary(config: Mapping[str, Any]) -> str:
    """A process's ``config()`` in a line: of a long list its ends, its length and a checksum.

    The checksum tells lists apart whose ends look the same.
    """
    return ", ".join(f"{key}={_brief(value)}" for key, value in config.items())


def _brief(value: Any) -> str:
    if not isinstance(value, list | tuple) or len(value) <= 8:
        return f"{value:.8g}" if isinstance(value, float) else str(value)
    digest = hashlib.sha256(json.dumps(list(value)).encode()).hexdigest()[:8]
    ends = f"{_brief(value[0])}, {_brief(value[1])}, ..., {_brief(value[-1])}"
    return f"[{ends}] ({len(value)} numbers, sha256 {digest})"


class Process(ABC):
    """A noise process on [t_min, t_max]; subclasses give three formulas and two inverses.

    Raises:
        ValueError: the range is not 0 <= t_min < t_max, or is not finite.
    """

    name: ClassVar[str]

    def __init__(self, t_min: float, t_max: float) -> None:
        if not (0.0 <= t_min < t_max and math.isfinite(t_max)):
            raise ValueError(
                f"{type(self).__name__}: t_min is {t_min}, t_max is {t_max}, "
                "expected finite 0 <= t_min < t_max"
            )
        self.t_min = float(t_min)
        self.t_max = float(t_max)

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Scale of the data at time ``t``, float64, same shape."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Standard deviation of the noise at time ``t``, float64, same shape."""

    @abstractmethod
    def log_alpha(self, t: Tensor | float) -> Tensor:
        """Log alpha(t)."""

    @abstractmethod
    def sigma_over_alpha(self, t: Tensor | float) -> Tensor:
        """sigma(t) / alpha(t), the noise level of the rescaled state x / alpha."""

    @abstractmethod
    def inverse_sigma(self, sigma_over_alpha: Tensor | float) -> Tensor:
        """The time at which sigma / alpha takes this value (not sigma itself)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able arguments; ``from_config(process.config())`` is an equal process."""

    def lambda_(self, t: Tensor | float) -> Tensor:
        """Half log-SNR log(alpha(t) / sigma(t)); infinite where alpha or sigma is zero."""
        return -torch.log(self.sigma_over_alpha(t))

    def inverse_lambda(self, lambda_: Tensor | float) -> Tensor:
        """The time at which ``lambda_`` takes this value."""
        return self.inverse_sigma(torch.exp(-as_float64(lambda_)))

    def breakpoints(self) -> Tensor | None:
        """Values of sigma / alpha, rising, between which it is smooth in t; None if everywhere."""
        return None

    def __repr__(self) -> str:
        arguments = ", ".join(
            f"{key}={value!r}" if not isinstance(value, list) else f"{key}=<{len(value)} values>"
            for key, value in self.config().items()
            if key != "name"
        )
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.config(), sort_keys=True))

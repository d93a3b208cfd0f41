"""What a published file holds, read without running it, and its settings with their types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...processes import EDM, Process, RectifiedFlow
from ...support.values import is_finite_number
from ..formats import load_plain
from ..restricted import Record, read_pickle

MOST_BYTES = 4 << 20
"""Files of learned solvers are small; larger ones are networks."""
MOST_POINTS = 1_000
_SAMPLERS = ("amed", "dpm_2", "dpm_pp", "dpm", "dyweight", "epd", "euler", "heun", "ipndm")
_NAMED = [(m, f"{n}_sampler") for m in ("solvers", "solvers_amed") for n in _SAMPLERS]
_EDM_DATA = ("cifar10", "ffhq", "afhqv2", "imagenet64")

_Value = TypeVar("_Value")


def read_small(path: Path) -> Any:
    """The contents of a ``.pkl``, ``.pt``, ``.pth`` or ``.ckpt`` file; None for other or larger files.

    Raises:
        UnsafeCheckpointError: the file asks for more than tensors, numbers and containers.
    """
    if path.suffix not in (".pkl", ".pt", ".pth", ".ckpt") or path.stat().st_size > MOST_BYTES:
        return None
    return read_pickle(path, _NAMED) if path.suffix == ".pkl" else load_plain(path)


class Predictor:
    """A pickled predictor of the diff-sampler family: tensors, attributes, and those of its loss."""

    def __init__(self, module: Record, loss: Any) -> None:
        self.module = module
        self._loss = loss.state if isinstance(loss, Record) else {}

    def get(self, name: str, kind: type[_Value], default: _Value | None = None) -> _Value:
        """The attribute ``name``; that of the loss where the module has none.

        Raises:
            ValueError: it is missing and has no default, or is no ``kind``.
        """
        value = self.module.state.get(name, self._loss.get(name))
        if value is None and default is not None:
            return default
        if kind is float and isinstance(value, int | float) and is_finite_number(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"its {name} is {value!r:.60}, expected {kind.__name__}")
        return value

    @property
    def points(self) -> int:
        """Times of its grid."""
        points = self.get("num_steps", int)
        if not 2 <= points <= MOST_POINTS:
            raise ValueError(f"its num_steps is {points}, expected 2..{MOST_POINTS}")
        return points

    def process(self, given: Process | None) -> Process:
        """``given``, or that of the EDM data sets and the flow models that a file names.

        Raises:
            ValueError: the file names a model whose noise it does not hold.
        """
        if given is not None:
            return given
        if self.get("backend", str, "") in ("flux", "sd3"):
            return RectifiedFlow()
        data = self.get("dataset_name", str, "")
        if data in _EDM_DATA:
            return EDM(0.002, 80.0)
        raise ValueError(
            f"it was made for {data or 'a model it does not name'}, whose noise levels are not in the "
            "file: give the model (--model on the command line) or its process"
        )

    def notes(self) -> dict[str, Any]:
        """What the solver was trained for, where the file says so."""
        wanted = ("dataset_name", "guidance_type", "guidance_rate", "schedule_type", "schedule_rho")
        found = {key: self.module.state.get(key, self._loss.get(key)) for key in wanted}
        return {k: v for k, v in found.items() if isinstance(v, str) or is_finite_number(v)}


def numbers(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """``value`` as finite float64 numbers of ``shape``.

    Raises:
        ValueError: naming what it is and what was expected.
    """
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or not value.is_floating_point()
    ):
        raise ValueError(f"its {name} is {type(value).__name__}, expected floating-point numbers")
    if tuple(value.shape) != shape:
        raise ValueError(f"its {name} has shape {tuple(value.shape)}, expected {shape}")
    found = value.detach().to("cpu", torch.float64)
    if not bool(found.isfinite().all()):
        raise ValueError(f"its {name} holds numbers that are not finite")
    return found


def take(options: dict[str, Any], name: str, default: Any = None) -> Any:
    """Removes an option and returns it."""
    return options.pop(name, default)


def no_more(options: Mapping[str, Any]) -> None:
    """ValueError for options that nothing has taken."""
    if options:
        raise ValueError(f"{sorted(options)[0]} is not an option of such files")

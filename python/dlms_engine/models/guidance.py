"""The two branches of classifier-free guidance as one batch of the network's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..support.values import is_finite_number

Join = Callable[[str, Tensor, Tensor], Tensor]
"""(path of the key, unconditional value, conditional value) -> what stands for both."""


class Branches:
    """Joins conditions with their unconditional counterparts, inside dicts, lists and tuples too.

    Copies on another device or in another dtype are kept until their source changes: a captured run
    may not copy from the host.
    """

    def __init__(self) -> None:
        self._moved: dict[Any, tuple[Tensor, int, Tensor]] = {}

    def joined(
        self, unconditional: Mapping[str, Any], conditions: Mapping[str, Any], join: Join
    ) -> dict[str, Any]:
        """``conditions`` with every tensor joined; one without a counterpart serves both branches.

        Raises:
            ValueError: an unconditional key that ``conditions`` has not, or a value of another kind.
        """
        return self._mapping("", conditions, unconditional, join)

    def read(self, unconditional: Mapping[str, Any], conditions: Mapping[str, Any]) -> list[Tensor]:
        """The unconditional tensors that a call with ``conditions`` reads, where it reads them."""
        found: list[Tensor] = []

        def keep(_path: str, other: Tensor, value: Tensor) -> Tensor:
            if other is not value:
                found.append(other)
            return value

        self.joined(unconditional, conditions, keep)
        return found

    def _mapping(
        self, path: str, conditions: Mapping[str, Any], other: Mapping[str, Any], join: Join
    ) -> dict[str, Any]:
        absent = [key for key in other if key not in conditions]
        if absent:
            raise ValueError(
                f"unconditional{path} has {absent}, which this call does not give the network: it gives "
                f"{sorted(map(str, conditions))}"
            )
        return {
            key: self._join(f"{path}[{key!r}]", value, other.get(key, value), join)
            for key, value in conditions.items()
        }

    def _join(self, path: str, value: Any, other: Any, join: Join) -> Any:
        kinds = (Tensor, Mapping, list | tuple)
        if any(isinstance(value, kind) and not isinstance(other, kind) for kind in kinds):
            raise ValueError(
                f"unconditional{path} is {type(other).__name__}, but this call gives "
                f"{type(value).__name__}"
            )
        if isinstance(value, Tensor):
            return join(path, other if other is value else self._like(path, other, value), value)
        if isinstance(value, Mapping):
            return self._mapping(path, value, other, join)
        if isinstance(value, list | tuple):
            if len(value) != len(other):
                raise ValueError(
                    f"unconditional{path} has {len(other)} entries, but this call gives {len(value)}"
                )
            parts = [
                self._join(f"{path}[{i}]", *pair, join)
                for i, pair in enumerate(zip(value, other, strict=True))
            ]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if other is not value and other != value:
            raise ValueError(
                f"unconditional{path} is {other!r}, but this call gives {value!r}: both branches are one "
                "batch, in which only tensors can differ"
            )
        return value

    def _like(self, path: str, source: Tensor, value: Tensor) -> Tensor:
        """``source`` on the device and in the dtype of ``value``."""
        if source.device == value.device and source.dtype == value.dtype:
            return source
        if torch.compiler.is_compiling() or source.is_inference():
            return source.to(device=value.device, dtype=value.dtype)
        place = (path, value.device, value.dtype)
        held = self._moved.get(place)
        if held is None or held[0] is not source or held[1] != source._version:
            moved = source.to(device=value.device, dtype=value.dtype)
            held = self._moved[place] = (source, source._version, moved)
        return held[2]


def doubled(batch: int) -> Join:
    """``[uncond; cond]``, each ``[batch, ...]``; one number for both branches stays as it is."""

    def join(path: str, other: Tensor, value: Tensor) -> Tensor:
        if value.ndim == 0 and other is value:
            return value
        size = (batch, *value.shape[1:])
        for name, given in (("unconditional", other), ("condition", value)):
            if not _expands(given, size):
                raise ValueError(
                    f"{name}{path} is {list(given.shape)}, expected {list(size)} or with one row: both "
                    f"branches of a batch of {batch} are one call, the condition gives their size (pad "
                    "the shorter one, and mask it)"
                )
        return torch.cat([other.expand(size), value.expand(size)])

    return join


def _expands(tensor: Tensor, size: tuple[int, ...]) -> bool:
    """Whether ``tensor.expand(size)`` is there."""
    sizes = zip(reversed(tensor.shape), reversed(size), strict=False)
    return tensor.ndim <= len(size) and all(mine in (whole, 1) for mine, whole in sizes)


def check_guidance(scale: Any, unconditional: bool) -> None:
    """ValueError unless ``scale`` is None, or finite with something ``unconditional`` beside it."""
    if scale is None:
        return
    if not is_finite_number(scale):
        raise ValueError(f"guidance_scale is {scale!r}, expected a finite number")
    if not unconditional:
        raise ValueError(
            f"guidance_scale is {scale} but unconditional is empty: pass the keyword tensors of the "
            "unconditional branch, e.g. unconditional={'class_labels': null}"
        )

"""Several tensors as one, which a captured run writes and copies out at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTensors:
    """Shapes and dtypes of tensors that are packed one after the other."""

    parts: tuple[tuple[torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> PackedTensors:
        return cls(tuple((t.shape, t.dtype) for t in tensors))

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return sum(shape.numel() for shape, _ in self.parts)

    def packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """``[size]`` in the widest dtype, from which every part comes back as it was."""
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])

    def unpacked(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Inverse of `packed`: views of ``whole`` where the dtype is the same."""
        pieces = whole.split([shape.numel() for shape, _ in self.parts])
        return tuple(
            piece.view(shape).to(dtype)
            for piece, (shape, dtype) in zip(pieces, self.parts, strict=True)
        )

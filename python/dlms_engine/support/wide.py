"""Tensors that stay in single precision when the module that holds them is cast to half."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def at_least_single(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``change``, as ``nn.Module._apply`` takes it, without casts to fewer than 32 bits.

    The rest of it is kept: a tensor goes to the device it would have gone to.
    """

    def changed(tensor: Tensor) -> Tensor:
        made = change(tensor)
        narrowed = made.dtype.itemsize < min(4, tensor.dtype.itemsize)
        return tensor.to(made.device) if narrowed else made

    return changed

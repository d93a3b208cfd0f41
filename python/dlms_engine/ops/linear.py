"""Small layers whose result for one sample has the same bits in any batch.

BLAS picks its kernel, and so the order of its sums, by the number of rows; torch computes some
functions (sigmoid, SiLU) with other instructions in the last few elements of a tensor. Rows that are
computed per sample must have neither: here a sum has one order, and every function is made of
operations that are rounded correctly or take all elements alike.

Under autograd the usual layers run, whose bits may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .schema import LIBRARY


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer`` on ``x`` ``[B, in]`` -> ``[B, out]``, float32 or float64."""
    if _usual():
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # rows without gradients do not heed it either
            with torch.autocast(kind, enabled=False):
                return cast(Tensor, layer(x))
        return cast(Tensor, layer(x))
    if torch.compiler.is_exporting():  # an exported program runs without this library
        return linear_rows(x, layer.weight, layer.bias)
    rows: Tensor = torch.ops.dlms.linear_rows.default(x, layer.weight, layer.bias)
    return rows


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x) if _usual() else 1 / (1 + torch.exp(-x))


def swish(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return nn.functional.silu(x) if _usual() else x / (1 + torch.exp(-x))


def _usual() -> bool:
    return torch.is_grad_enabled()


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator's meaning: products in the order of the inputs, then the upper half is added to
    the lower one until one is left.
    """
    sums = x.t()[:, :, None] * weight.t()[:, None, :]  # [in, B, out]
    while (count := sums.shape[0]) > 1:
        half = (count + 1) // 2
        added = sums[: count - half] + sums[half:]
        sums = added if count % 2 == 0 else torch.cat([added, sums[half - 1 : half]])
    return sums[0] if bias is None else sums[0] + bias


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def register() -> None:
    """Define ``dlms::linear_rows`` with its eager and fake kernels."""
    schema = "linear_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl("linear_rows", linear_rows, "CompositeExplicitAutograd")
    fake: Callable[..., Any] = torch.library.register_fake
    fake("dlms::linear_rows", _fake, lib=LIBRARY)


register()

"""Dynamic thresholding (Saharia et al. 2022): data predictions are clipped at a quantile."""

from __future__ import annotations

import torch
from torch import Tensor


def thresholded(
    x: Tensor, value: Tensor, prediction: str, alpha: Tensor, sigma: Tensor, q: float
) -> Tensor:
    """The prediction ``value`` ``[B, ...]`` ("data" or "noise") with its data part clipped.

    Args:
        x: ``[B, ...]`` the state. alpha, sigma: its coefficients, which broadcast over it.
        q: quantile in (0, 1] of |data| per sample; bounds below 1 are 1.
    """
    data = value if prediction == "data" else (x - sigma * value) / alpha
    bound = quantile(data.flatten(1).abs(), q).clamp(min=1)
    bound = bound.reshape(-1, *([1] * (x.ndim - 1)))
    data = data.clamp(-bound, bound) / bound
    return data if prediction == "data" else (x - alpha * data) / sigma


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of ``[B, n]``, linear between neighbours: ``[B]``.

    ``torch.quantile`` takes at most 2^24 numbers, and torch 2.11 cannot export it with a dynamic batch.
    """
    ordered = values.sort(dim=1).values
    last = values.shape[1] - 1
    position = q * last
    low = min(int(position), last)
    return torch.lerp(ordered[:, low], ordered[:, min(low + 1, last)], position - low)

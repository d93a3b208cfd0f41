"""How far a fast sampler ends from where a converged one ends, from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor


def endpoint_rmse_per_sample(samples: Tensor, reference: Tensor) -> Tensor:
    """Root mean squared difference of each pair of samples, float64 ``[B]``, in data units.

    Args:
        samples: ``[B, ...]``.
        reference: same shape; endpoints of a fine solver started from the same noise.

    Raises:
        ValueError: the shapes differ or the batch is empty.
    """
    if samples.shape != reference.shape:
        raise ValueError(
            f"samples {tuple(samples.shape)} and reference {tuple(reference.shape)} differ in shape"
        )
    if samples.ndim == 0 or samples.numel() == 0:
        raise ValueError(f"nothing to compare: shape {tuple(samples.shape)}, expected [B, ...]")
    wide = reference.to(device=samples.device, dtype=torch.float64)
    difference = samples.to(torch.float64) - wide
    return difference.reshape(len(difference), -1).square().mean(dim=1).sqrt()


def endpoint_rmse(samples: Tensor, reference: Tensor) -> float:
    """Square root of the squared difference averaged over samples and pixels, in data units.

    Not the mean of :func:`endpoint_rmse_per_sample`: the mean is taken before the root.

    Raises:
        ValueError: as :func:`endpoint_rmse_per_sample`.
    """
    return float(endpoint_rmse_per_sample(samples, reference).square().mean().sqrt())

"""Whether a learner reads the network's bottleneck, and how long the vector is."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser

_log = logging.getLogger("dlms_engine")


def reads_bottleneck(denoiser: Denoiser, wanted: bool, method: str) -> bool:
    """``wanted``, but False, and said so, where the denoiser taps no module."""
    if wanted and denoiser.features is None:
        _log.info(
            "%s: the denoiser taps no module, so every sample gets the same rows; "
            "Denoiser(features='mid_block') lets it read the bottleneck",
            method,
        )
        return False
    return wanted


@torch.no_grad()
def feature_size(
    denoiser: Denoiser, shape: tuple[int, ...], t: Tensor | float, conditions: dict[str, Any]
) -> int:
    """Length of the bottleneck feature vector for samples of ``shape``: one call on zeros."""
    denoiser.predict(
        torch.zeros(1, *shape, device=denoiser.device, dtype=torch.float32), t, **conditions
    )
    return int(denoiser.last_features.shape[1])

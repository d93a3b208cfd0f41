"""Models that the stages run on: the embedded one, or a tiny one where diffusers is absent."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dlms_engine import Denoiser


def load(
    name: str, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, nn.Module, tuple[int, ...]]:
    """(denoiser, feature network, shape of a sample); ``name`` is "embedded" or "tiny".

    Raises:
        ImportError: diffusers is not installed ("embedded").
    """
    if name == "tiny":
        import cli_model

        model: Any = cli_model.tiny()
        return model.denoiser.to(device), cli_model.Means().to(device), cli_model.SHAPE
    from dlms_engine import embedded

    return (
        embedded.load_embedded(device, dtype),
        embedded.embedded_features(device),
        embedded.IMAGE_SHAPE,
    )

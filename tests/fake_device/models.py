"""What the tests on the stand-in device run: a small U-Net, its solvers, short settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dlms_engine as dlms
from dlms_engine.models.unet import UNet

SHAPE = (3, 16, 16)
SHORT: dict[str, Any] = {
    "batch": 4,
    "validation_samples": 4,
    "validation_steps": 6,
    "validate_every": 0,
}


def network(classes: int = 0) -> nn.Module:
    """Random weights; the bottleneck is 8x8, as the designers read it."""
    torch.manual_seed(0)
    made = UNet(16, (8, 16), 1, (1,), head=8, groups=4, classes=classes)
    for layer in made.modules():  # what starts as 0 would hide the rest
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.05)
    return made.eval().requires_grad_(False)


def denoiser(device: str = "cpu", **options: Any) -> dlms.Denoiser:
    """An EDM denoiser on ``device``."""
    made = network(options.pop("classes", 0))
    for change in ("dtype", "memory_format"):
        if change in options:
            made = (
                made.to(options.pop(change))
                if change == "dtype"
                else made.to(memory_format=options.pop(change))
            )
    return dlms.Denoiser(
        made.to(device), dlms.processes.EDM(), "edm", features="mid_block", **options
    )


def table(process: Any) -> Any:
    """A handcrafted solver of five evaluations."""
    return dlms.solvers.ipndm(process, dlms.grids.polynomial(process, 5), order=4)

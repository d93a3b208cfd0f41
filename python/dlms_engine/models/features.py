"""The feature network of the Frechet distance on 32x32 images."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualFeatures(nn.Module):
    """A small ResNet without its last layer: images in [-1, 1] -> features.

    A convolution, then a level for each further width: a convolution, halved sides, one residual
    pair of convolutions; the mean over the positions. Smooth throughout (SiLU, average pooling),
    so the features can be differentiated with respect to the images; scaled to a mean variance of
    1 over the training images.

    Args:
        widths: channels of the first convolution and of each level; the last is the number of
            features. ``(64, 128, 256)`` has a third level of 256, too.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.num_features = self.widths[-1]
        self.first = _Convolution(3, self.widths[0])
        before = self.widths
        after = (*self.widths[1:], self.widths[-1])
        self.steps = nn.ModuleList(_Convolution(a, b) for a, b in zip(before, after, strict=True))
        self.pairs = nn.ModuleList(
            nn.Sequential(_Convolution(b, b), _Convolution(b, b)) for b in after
        )
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, F]``, same dtype; H and W divisible by 2^levels."""
        x = self.first(images)
        for step, pair in zip(self.steps, self.pairs, strict=True):
            x = functional.avg_pool2d(step(x), 2)
            x = x + pair(x)
        return cast(Tensor, x.mean(dim=(2, 3)) * self.scale)


class _Convolution(nn.Module):
    """3x3 convolution, batch norm, SiLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(cast(Tensor, self.norm(self.convolution(x))))

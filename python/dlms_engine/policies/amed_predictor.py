"""The AMED predictor: bottleneck features and two times -> r, direction scale, time scale.

Zhou et al., CVPR 2024 (arXiv:2312.00094), section 3.4 and figure 6.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import linear
from ..support.versioned import Versioned

TIME_CHANNELS = 8
LONGEST = 1e4


class Choice(NamedTuple):
    """What the predictor says of one step: float64, per sample."""

    r: Tensor  # [B] in (0, 1): where the middle lies between this time and the next
    scale_dir: Tensor  # [B] c_n, factor of the direction that ends the step
    scale_time: (
        Tensor  # [B] a_n, factor of the sigma / alpha the network is called with in the middle
    )


class AmedPredictor(Versioned, nn.Module):
    """About 9k parameters: features -> 128 -> 4, two times -> 8 each, one linear head per number.

    Parameter names are those of the published predictors, so that their tensors load by name.

    Args:
        features: length F of the bottleneck feature vector (the published 8x8 grid is 64).
        scale_dir: a >= 0, c_n lies in (1 - a, 1 + a); 0 leaves the head out and c_n = 1.
        scale_time: the same for a_n.
        bottleneck: False puts zeros for the features, so that all samples get the same numbers.
    """

    rates: Tensor

    def __init__(
        self,
        features: int = 64,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
        *,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}, expected at least 1")
        for name, value in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected a number in [0, 1)")
        self.features = features
        self.bottleneck = bottleneck
        self.scale_dir = float(scale_dir)
        self.scale_time = float(scale_time)
        self.map_layer0 = _linear(TIME_CHANNELS, TIME_CHANNELS, xavier=True)
        self.enc_layer0 = _linear(features, 128)
        self.enc_layer1 = _linear(128, 4)
        width = 4 + 2 * TIME_CHANNELS
        self.fc_r = _linear(width, 1)
        self.fc_scale_dir = _linear(width, 1) if scale_dir else None
        self.fc_scale_time = _linear(width, 1) if scale_time else None
        # rounded to float32 as in the published predictors, whose weights were fitted to it
        exponent = torch.arange(TIME_CHANNELS // 2, dtype=torch.float32, device="cpu") / (
            TIME_CHANNELS // 2 - 1
        )
        self.register_buffer("rates", (1 / LONGEST) ** exponent, persistent=False)

    def forward(self, features: Tensor | None, level: Tensor, level_next: Tensor) -> Choice:
        """The choice for a step from noise level ``level`` to ``level_next``.

        Args:
            features: ``[B, F]``; None stands for zeros (the analytical first step).
            level, level_next: ``[B]`` float64 sigma / alpha at both ends.
        """
        dtype = self.fc_r.weight.dtype
        if features is None or not self.bottleneck:
            features = self.fc_r.weight.new_zeros(level.shape[0], self.features)
        elif features.shape[1:] != (self.features,):
            raise ValueError(
                f"features are {tuple(features.shape)}, expected [B, {self.features}]: the "
                "predictor was made for another bottleneck"
            )
        hidden = linear.swish(linear.linear(self.enc_layer0, features.to(dtype)))
        encoded = linear.linear(self.enc_layer1, hidden)
        joined = torch.cat([encoded, self._embed(level), self._embed(level_next)], dim=1)
        r = linear.sigmoid(linear.linear(self.fc_r, joined))[:, 0].to(torch.float64)
        return Choice(
            r,
            _scale(self.fc_scale_dir, joined, self.scale_dir, r),
            _scale(self.fc_scale_time, joined, self.scale_time, r),
        )

    def _embed(self, level: Tensor) -> Tensor:
        """``[B]`` -> ``[B, 8]``: waves of the raw level through one layer for both times."""
        dtype = self.map_layer0.weight.dtype
        angles = level.to(dtype)[:, None] * self.rates.to(dtype)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return linear.swish(linear.linear(self.map_layer0, waves))


def _scale(head: nn.Linear | None, joined: Tensor, bound: float, like: Tensor) -> Tensor:
    if head is None:
        return torch.ones_like(like)
    unit = linear.sigmoid(linear.linear(head, joined))[:, 0].to(torch.float64)
    return 2 * bound * unit + 1 - bound


def _linear(inputs: int, outputs: int, *, xavier: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=torch.float32, device="cpu")
    if xavier:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer

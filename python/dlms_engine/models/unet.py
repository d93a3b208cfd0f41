"""The U-Net of the embedded emoji models and of the benchmark model: torch alone, no extra package.

Residual blocks and attention as in Dhariwal and Nichol (2021): the noise level and the class scale
and shift the second normalisation of a block. ``patch`` 2 folds 2x2 pixels into channels, so that a
32x32 image costs what a 16x16 one does. The time embedding is smooth: its fastest period is 0.4 in
c_noise, 1.6 in ln(sigma), so that neighbouring noise levels get neighbouring answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 32
SLOWEST, FASTEST = 0.5, 16.0
"""Angular frequencies of the time embedding, per unit of ``time_scale * c_noise``."""


class UNet(nn.Module):
    """``network(x, c_noise, class_labels=None)``, as a :class:`Denoiser` calls it.

    Args:
        size: side of the square images.
        channels: of each level, from the top; the sides halve from one to the next.
        layers: residual blocks a level, down and up.
        attention: levels with attention after each block; the middle always has one.
        patch: side of the pixel squares folded into channels; ``size / patch`` must be divisible by
            ``2 ** (levels - 1)``.
        head: channels of an attention head; every attended width must be divisible by it.
        groups: of the normalisations; every width must be divisible by it.
        classes: number of classes; 0: unconditional. Class ``classes`` means none.
        time_scale: spreads the time argument over about 2.5 (c_noise of EDM does so by itself).

    ``mid_block`` is the bottleneck, ``[B, C, S, S]`` of the lowest level.

    Raises:
        ValueError: widths, groups and sides that do not fit.
    """

    def __init__(
        self,
        size: int = 32,
        channels: Sequence[int] = (64, 128, 256),
        layers: int = 2,
        attention: Sequence[int] = (1, 2),
        *,
        patch: int = 1,
        head: int = 64,
        groups: int = 32,
        classes: int = 0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        levels = len(channels)
        if size % (patch * 2 ** (levels - 1)):
            raise ValueError(
                f"size is {size}, expected a multiple of {patch * 2 ** (levels - 1)}: "
                f"{levels} levels above patches of {patch}"
            )
        attended = {*(channels[n] for n in attention), channels[-1]}
        if any(width % groups for width in channels) or any(width % head for width in attended):
            raise ValueError(
                f"channels are {list(channels)}: each must be divisible by groups = {groups}, and "
                f"those with attention by head = {head}"
            )
        self.size, self.patch, self.classes = size, patch, classes
        self.time_scale = time_scale
        width = 4 * channels[0]
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.conv_in = nn.Conv2d(3 * patch**2, channels[0], 3, padding=1)

        def block(before: int, after: int, level: int) -> Block:
            return Block(before, after, width, groups, head if level in attention else 0)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, here in enumerate(channels):
            self.down.append(nn.ModuleList(block(here, here, level) for _ in range(layers)))
            self.up.append(nn.ModuleList(block(2 * here, here, level) for _ in range(layers)))
            if level + 1 < levels:
                self.shrink.append(nn.Conv2d(here, channels[level + 1], 3, stride=2, padding=1))
                self.grow.append(nn.Conv2d(channels[level + 1], here, 3, padding=1))
        self.mid_block = Middle(channels[-1], width, groups, head)
        self.norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = _zeroed(nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Raw output like ``x`` ``[B, 3, size, size]``; ``c_noise`` ``[B]``, float32 or wider.

        ``class_labels`` ``[B]`` int64; None: no class for any.
        """
        emb = self.embedding(c_noise, class_labels)
        h = self.conv_in(functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = []
        for level, blocks in enumerate(self.down):
            for block in cast(nn.ModuleList, blocks):
                h = block(h, emb)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.mid_block(h, emb)
        for level in reversed(range(len(self.up))):
            for block in cast(nn.ModuleList, self.up[level]):
                h = block(torch.cat([h, skips.pop()], 1), emb)
            if level:
                # Before enlarging: the same convolution afterwards would cost four times as much.
                h = functional.interpolate(self.grow[level - 1](h), scale_factor=2.0)
        h = self.conv_out(functional.silu(self.norm_out(h)))
        return functional.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def embedding(self, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``[B, 4 * channels[0]]`` in the dtype of the weights; angles in that of ``c_noise``.

        Raises:
            ValueError: class labels for an unconditional network.
        """
        dtype = self.conv_in.weight.dtype
        steps = torch.arange(FREQUENCIES, device=c_noise.device, dtype=c_noise.dtype)
        ratio = math.log(FASTEST / SLOWEST) / (FREQUENCIES - 1)
        angles = (self.time_scale * c_noise)[:, None] * (SLOWEST * torch.exp(ratio * steps))
        emb: Tensor = self.time(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))
        if self.label is not None:
            if class_labels is None:
                class_labels = torch.full_like(c_noise, self.classes, dtype=torch.int64)
            emb = emb + self.label(class_labels)
        elif class_labels is not None:
            raise ValueError("class_labels are given, but the network is unconditional")
        return functional.silu(emb)


class Block(nn.Module):
    """Two 3x3 convolutions around the identity, then attention where ``head`` is not 0."""

    def __init__(self, before: int, after: int, width: int, groups: int, head: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.affine = nn.Linear(width, 2 * after)
        self.norm2 = nn.GroupNorm(groups, after)
        self.conv2 = _zeroed(nn.Conv2d(after, after, 3, padding=1))
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.attention = Attention(after, groups, head) if head else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        h = functional.silu(self.norm2(h) * (1 + scale) + shift)
        return cast(Tensor, self.attention(self.skip(x) + self.conv2(h)))


class Attention(nn.Module):
    """Self-attention over the positions, around the identity."""

    def __init__(self, channels: int, groups: int, head: int) -> None:
        super().__init__()
        self.heads = channels // head
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = parts.transpose(3, 4).unbind(1)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + cast(Tensor, self.out(mixed.transpose(2, 3).reshape(b, c, height, width)))


class Middle(nn.Module):
    """A block with attention, then one without."""

    def __init__(self, channels: int, width: int, groups: int, head: int) -> None:
        super().__init__()
        self.first = Block(channels, channels, width, groups, head)
        self.second = Block(channels, channels, width, groups, 0)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x, emb), emb))


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A layer that starts as 0, so that what it closes starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

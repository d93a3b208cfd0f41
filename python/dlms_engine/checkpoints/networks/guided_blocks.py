"""Layers of the guided-diffusion U-Nets (Dhariwal & Nichol 2021, section 3; ADM).

Attribute names are those of the published weights, so that their tensors load by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


class Norm32(nn.GroupNorm):
    """32 groups, computed in float32 whatever the weights' dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = F.group_norm(
            x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps
        )
        return out.to(x.dtype)


def time_embedding(times: Tensor, channels: int) -> Tensor:
    """``[B]`` -> ``[B, channels]``: cos, then sin, at 10000^(-i / half) (Vaswani et al. 2017)."""
    half = channels // 2
    index = torch.arange(half, dtype=times.dtype, device=times.device)
    angles = times[:, None] * torch.exp(-math.log(10000.0) * index / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


@dataclass(frozen=True)
class GuidedStyle:
    """What the published configurations differ in.

    Attributes:
        embedding: channels of the time embedding.
        scale_shift: the embedding scales and shifts after the norm; else it is added before.
        heads, head_channels: ``head_channels`` goes before ``heads`` unless it is -1.
        split_first: packed as (q, k, v), head, channel ("new attention order", and flash attention in
            the consistency-model repository); else head, (q, k, v), channel.
        dims: 1 for qkv weights ``[3C, C, 1]`` (guided-diffusion), 2 for ``[3C, C, 1, 1]``.
    """

    embedding: int
    dropout: float
    scale_shift: bool
    heads: int
    head_channels: int
    split_first: bool
    dims: int = 1


class Resize(nn.Module):
    """By 2: nearest neighbour up, 2 x 2 means down. No parameters."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)


class Downsample(nn.Module):
    """A convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.op(x))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0)))


class ResBlock(nn.Module):
    """Residual block; ``resize`` "up" or "down" resamples both branches before the first convolution."""

    def __init__(
        self, inputs: int, outputs: int, style: GuidedStyle, resize: str | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = style.scale_shift
        self.resize = None if resize is None else Resize(resize == "up")
        self.in_layers = nn.Sequential(
            Norm32(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        width = outputs * (2 if style.scale_shift else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(style.embedding, width))
        last = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(Norm32(outputs), nn.SiLU(), nn.Dropout(style.dropout), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` ``[B, inputs, H, W]``, ``embedding`` ``[B, E]`` -> ``[B, outputs, H', W']``."""
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = conv(h)
        projected = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + projected)
        for layer in rest:
            h = layer(h)
        return cast(Tensor, self.skip_connection(x) + h)


def attend(packed: Tensor, heads: int, split_first: bool) -> Tensor:
    """Self-attention of ``[B, 3C, T]`` packed queries, keys and values -> ``[B, C, T]``."""
    batch, width, length = packed.shape
    if split_first:
        parts = packed.reshape(batch, 3, heads, -1, length).unbind(1)
    else:
        parts = packed.reshape(batch, heads, 3, -1, length).unbind(2)
    q, k, v = (part.transpose(-1, -2) for part in parts)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(-1, -2).reshape(batch, width // 3, length)


class AttentionBlock(nn.Module):
    """Residual self-attention over positions."""

    def __init__(self, channels: int, style: GuidedStyle, heads: int) -> None:
        super().__init__()
        if style.head_channels != -1 and channels % style.head_channels:
            raise ValueError(
                f"{channels} channels are no multiple of num_head_channels={style.head_channels}"
            )
        self.heads = heads if style.head_channels == -1 else channels // style.head_channels
        self.split_first = style.split_first
        conv = nn.Conv1d if style.dims == 1 else nn.Conv2d
        self.norm = Norm32(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> the same shape."""
        flat = x.flatten(2)
        normed: Tensor = self.norm(flat)
        if self.qkv.weight.ndim == 4:
            mixed = attend(self.qkv(normed.unsqueeze(-1)).squeeze(-1), self.heads, self.split_first)
            out = self.proj_out(mixed.unsqueeze(-1)).squeeze(-1)
        else:
            out = self.proj_out(attend(self.qkv(normed), self.heads, self.split_first))
        residual: Tensor = (flat + out).reshape(x.shape)
        return residual


class AttentionPool(nn.Module):
    """One vector from an image: the mean attends to every position (as in CLIP)."""

    def __init__(self, side: int, channels: int, head_channels: int, outputs: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, outputs, 1)
        self.heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, side, side]`` -> ``[B, outputs]``."""
        flat = x.flatten(2)
        flat = torch.cat([flat.mean(dim=-1, keepdim=True), flat], dim=-1)
        flat = flat + self.positional_embedding.to(flat)
        mixed = self.c_proj(attend(self.qkv_proj(flat), self.heads, True))
        return cast(Tensor, mixed[:, :, 0])


class Stage(nn.Sequential):
    """Layers of one index of the published state dict; only residual blocks see the embedding."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(*layers)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x

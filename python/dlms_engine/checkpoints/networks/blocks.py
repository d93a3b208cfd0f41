"""Layers shared by DDPM++ / NCSN++ (Song et al. 2021) and ADM (Dhariwal & Nichol 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.wide import at_least_single

GROUP_CHANNELS = 4  # fewest channels of a normalisation group


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


class Resample(nn.Module):
    """A convolution after resampling by 2 with a separable filter; ``kernel`` 0 only resamples.

    With ``fused`` the image is padded once, for both, before the downsampling convolution, as in
    the residual branch of NCSN++; the results differ at the border.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            bound = 1 / math.sqrt(inputs * kernel**2)
            shape = (outputs, inputs, kernel, kernel)
            self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(outputs))
        line = torch.as_tensor(taps, dtype=torch.float32)
        plane = (line[:, None] * line / line.sum() ** 2)[None, None]
        self.register_buffer("resample_filter", plane if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` -> ``[B, outputs, H', W']``."""
        weight, plane = self.weight, self.resample_filter
        pad = 0 if weight is None else weight.shape[-1] // 2
        if plane is None:
            assert weight is not None
            return F.conv2d(x, weight.to(x), self._bias(x), padding=pad)
        edge = (plane.shape[-1] - 1) // 2
        if self.fused and self.down and weight is not None:
            x = self._filter(F.conv2d(x, weight.to(x), padding=pad + edge), plane, 0)
            assert self.bias is not None
            return x + self.bias.to(x)[:, None, None]
        x = self._filter(x, plane, edge)
        return x if weight is None else F.conv2d(x, weight.to(x), self._bias(x), padding=pad)

    def _bias(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x)

    def _filter(self, x: Tensor, plane: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        per_channel = plane.to(x).expand(channels, 1, -1, -1)
        if self.down:
            return F.conv2d(x, per_channel, groups=channels, stride=2, padding=padding)
        return F.conv_transpose2d(x, 4 * per_channel, groups=channels, stride=2, padding=padding)


class Norm(nn.GroupNorm):
    """At most 32 groups of at least 4 channels; in the input's dtype."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(min(32, channels // GROUP_CHANNELS), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x), self.bias.to(x), self.eps)


class Positional(nn.Module):
    """cos and sin of the time at geometric frequencies down to 1e-4 (Vaswani et al. 2017).

    ``endpoint``: the last frequency is exactly 1e-4.
    """

    def __init__(self, channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.rates, self.endpoint = channels // 2, endpoint

    def forward(self, t: Tensor) -> Tensor:
        """``[B]`` -> ``[B, channels]``."""
        index = torch.arange(self.rates, dtype=torch.float32, device=t.device)
        rates = (1 / 10000) ** (index / (self.rates - int(self.endpoint)))
        angles = t[:, None] * rates.to(t)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Fourier(nn.Module):
    """cos and sin at fixed random frequencies (Tancik et al. 2020).

    The angles reach hundreds of radians: frequencies rounded to half precision would be others.
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        super()._apply(at_least_single(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, t: Tensor) -> Tensor:
        """``[B]`` -> ``[B, channels]``."""
        angles = t[:, None] * (2 * math.pi * self.freqs).to(t)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@dataclass(frozen=True)
class BlockStyle:
    """What tells the families' residual blocks apart.

    Attributes:
        embedding: channels of the time embedding.
        adaptive_scale: the embedding scales and shifts (ADM); else it is added (DDPM++).
        heads: attention heads; None for one per 64 channels.
        skip_scale: factor after each addition.
        project_resampled: the skip of a resampling block has a 1x1 convolution.
    """

    embedding: int
    dropout: float
    adaptive_scale: bool
    heads: int | None
    skip_scale: float
    eps: float
    taps: tuple[float, ...] = (1, 1)
    project_resampled: bool = False


class UNetBlock(nn.Module):
    """Residual block with time embedding, optional resampling and self-attention."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: BlockStyle,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.style = inputs, outputs, style
        self.norm0 = Norm(inputs, style.eps)
        self.conv0 = Resample(inputs, outputs, 3, up=up, down=down, taps=style.taps)
        self.affine = nn.Linear(style.embedding, outputs * (2 if style.adaptive_scale else 1))
        self.norm1 = Norm(outputs, style.eps)
        self.conv1 = Resample(outputs, outputs, 3)
        self.skip: Resample | None = None
        if outputs != inputs or up or down:
            kernel = 1 if style.project_resampled or outputs != inputs else 0
            self.skip = Resample(inputs, outputs, kernel, up=up, down=down, taps=style.taps)
        self.heads = (style.heads or outputs // 64) if attention else 0
        if self.heads:
            self.norm2 = Norm(outputs, style.eps)
            self.qkv = Resample(outputs, 3 * outputs, 1)
            self.proj = Resample(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` ``[B, inputs, H, W]``, ``embedding`` ``[B, E]`` -> ``[B, outputs, H', W']``."""
        style = self.style
        h = self.conv0(silu(self.norm0(x)))
        projected = self.affine(embedding)[:, :, None, None].to(h)
        if style.adaptive_scale:
            scale, shift = projected.chunk(2, dim=1)
            h = silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = silu(self.norm1(h + projected))
        h = self.conv1(F.dropout(h, style.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * style.skip_scale
        return (x + self._attend(x)) * style.skip_scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        packed = self.qkv(self.norm2(x))
        # channels are laid out head, channel, (q, k, v)
        packed = packed.reshape(batch, self.heads, channels // self.heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in packed.unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(-1, -2).reshape(x.shape))
        return out

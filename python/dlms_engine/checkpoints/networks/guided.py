"""U-Net and noisy classifier of guided-diffusion (Dhariwal & Nichol 2021).

Argument names and state-dict keys are those of the published code; the consistency-model
repository's EDM networks are the same U-Net.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...support.versioned import Versioned
from .guided_blocks import (
    AttentionBlock,
    AttentionPool,
    Downsample,
    GuidedStyle,
    Norm32,
    ResBlock,
    Stage,
    Upsample,
    time_embedding,
)


class _Trunk(Versioned, nn.Module):
    """Time embedding, the downward path and the middle."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float],
        num_heads: int,
        resblock_updown: bool,
        style: GuidedStyle,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.style = style
        self.widths = [int(mult * model_channels) for mult in channel_mult]
        width = self.widths[0]
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, style.embedding),
            nn.SiLU(),
            nn.Linear(style.embedding, style.embedding),
        )
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, width, 3, padding=1)])])
        self.skips = [width]
        for level, target in enumerate(self.widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [ResBlock(width, target, style)]
                width = target
                if 2**level in attention_resolutions:
                    layers.append(AttentionBlock(width, style, num_heads))
                self.input_blocks.append(Stage(layers))
                self.skips.append(width)
            if level < len(self.widths) - 1:
                down = ResBlock(width, width, style, "down") if resblock_updown else None
                self.input_blocks.append(Stage([down or Downsample(width)]))
                self.skips.append(width)
        middle = AttentionBlock(width, style, num_heads)
        self.middle_block = Stage(
            [ResBlock(width, width, style), middle, ResBlock(width, width, style)]
        )

    def embed(self, timesteps: Tensor) -> Tensor:
        """``[B]`` -> ``[B, E]``; sine and cosine in the times' own precision."""
        encoded = time_embedding(timesteps, self.model_channels)
        weights = next(self.time_embed.parameters())
        embedded: Tensor = self.time_embed(encoded.to(weights.dtype))
        return embedded


class GuidedUNet(_Trunk):
    """Called as ``network(x, timesteps, class_labels)``; arguments as published.

    Args:
        attention_resolutions: downsampling factors with attention, e.g. ``(2, 4, 8)``.
        attention_dims: 2 for weights of the consistency-model repository.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        attention_dims: int = 1,
    ) -> None:
        style = GuidedStyle(
            4 * model_channels, dropout, use_scale_shift_norm, num_heads, num_head_channels,
            use_new_attention_order, attention_dims,
        )  # fmt: skip
        super().__init__(
            in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult,
            num_heads, resblock_updown, style,
        )  # fmt: skip
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, style.embedding)
        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        width, skips = self.widths[-1], list(self.skips)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(self.widths))):
            for i in range(num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(width + skips.pop(), self.widths[level], style)]
                width = self.widths[level]
                if 2**level in attention_resolutions:
                    layers.append(AttentionBlock(width, style, heads))
                if level and i == num_res_blocks:
                    up = ResBlock(width, width, style, "up") if resblock_updown else None
                    layers.append(up or Upsample(width))
                self.output_blocks.append(Stage(layers))
        self.out = nn.Sequential(
            Norm32(width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """``x`` ``[B, C, H, W]``, ``timesteps`` ``[B]``, ``class_labels`` ``[B]`` indices.

        Raises:
            ValueError: labels are missing, or given to an unconditional network.
        """
        if (class_labels is None) != (self.num_classes is None):
            need = f"expected class_labels below {self.num_classes}" if self.num_classes else ""
            raise ValueError(
                f"class_labels is {'missing' if class_labels is None else 'given'}, "
                f"{need or 'but the network is unconditional'}"
            )
        embedding = self.embed(timesteps)
        if class_labels is not None:
            embedding = embedding + self.label_emb(class_labels.long())
        h, kept = x, list[Tensor]()
        for stage in self.input_blocks:
            h = stage(h, embedding)
            kept.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, kept.pop()], dim=1), embedding)
        out: Tensor = self.out(h)
        return out


class GuidedClassifier(_Trunk):
    """log-odds of the classes of a noisy image, ``classifier(x, timesteps)`` -> ``[B, classes]``.

    Args:
        image_size: side of the images; ``pool="attention"`` has one embedding a position.
        pool: "attention" (all published ones) or "adaptive".
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_heads: int = 1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        pool: str = "attention",
        dropout: float = 0.0,
        attention_dims: int = 1,
    ) -> None:
        if pool not in ("attention", "adaptive"):
            raise ValueError(f"pool is {pool!r}, expected 'attention' or 'adaptive'")
        style = GuidedStyle(
            4 * model_channels, dropout, use_scale_shift_norm, num_heads, num_head_channels,
            use_new_attention_order, attention_dims,
        )  # fmt: skip
        super().__init__(
            in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult,
            num_heads, resblock_updown, style,
        )  # fmt: skip
        width = self.widths[-1]
        side = image_size >> (len(self.widths) - 1)
        last: list[nn.Module] = (
            [AttentionPool(side, width, num_head_channels, out_channels)]
            if pool == "attention"
            else [nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, out_channels, 1), nn.Flatten()]
        )
        self.out = nn.Sequential(Norm32(width), nn.SiLU(), *last)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """``x`` ``[B, C, H, W]``, ``timesteps`` ``[B]``."""
        embedding = self.embed(timesteps)
        for stage in self.input_blocks:
            x = stage(x, embedding)
        out: Tensor = self.out(self.middle_block(x, embedding))
        return out

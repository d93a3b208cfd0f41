"""ADM (Dhariwal & Nichol 2021, section 3), in the arrangement of Karras et al. 2022."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...support.versioned import Versioned
from .blocks import BlockStyle, Norm, Positional, Resample, UNetBlock, silu
from .song import encoded_times, one_hot


class DhariwalUNet(Versioned, nn.Module):
    """Called as ``network(x, noise_labels, class_labels)``; arguments as published."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        embedding = model_channels * channel_mult_emb
        self._style = BlockStyle(embedding, dropout, True, None, 1.0, 1e-5)
        self.map_noise = Positional(model_channels, endpoint=False)
        self.map_augment = (
            nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        )
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(label_dim, embedding, bias=False) if label_dim else None
        widths = [model_channels * m for m in channel_mult]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        self._encode(img_resolution, in_channels, widths, num_blocks, attn_resolutions)
        self._decode(img_resolution, widths, num_blocks, attn_resolutions)
        self.out_norm = Norm(widths[0], 1e-5)
        self.out_conv = Resample(widths[0], out_channels, 3)

    def _encode(
        self, size: int, inputs: int, widths: list[int], blocks: int, attended: Sequence[int]
    ) -> None:
        style, width = self._style, widths[0]
        for level, target in enumerate(widths):
            res = size >> level
            name = f"{res}x{res}"
            if level == 0:
                self.enc[f"{name}_conv"] = Resample(inputs, width, 3)
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, style, down=True)
            for i in range(blocks):
                attention = res in attended
                self.enc[f"{name}_block{i}"] = UNetBlock(width, target, style, attention=attention)
                width = target

    def _decode(self, size: int, widths: list[int], blocks: int, attended: Sequence[int]) -> None:
        style, width, last = self._style, widths[-1], len(widths) - 1
        skips = [block.out_channels for block in self.enc.values()]
        for level in range(last, -1, -1):
            res = size >> level
            name = f"{res}x{res}"
            if level == last:
                self.dec[f"{name}_in0"] = UNetBlock(width, width, style, attention=True)
                self.dec[f"{name}_in1"] = UNetBlock(width, width, style)
            else:
                self.dec[f"{name}_up"] = UNetBlock(width, width, style, up=True)
            for i in range(blocks + 1):
                joined = width + int(skips.pop())  # type: ignore[arg-type]
                width = widths[level]
                attention = res in attended
                self.dec[f"{name}_block{i}"] = UNetBlock(joined, width, style, attention=attention)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """``x`` ``[B, C, H, W]``, ``noise_labels`` ``[B]`` -> ``[B, out_channels, H, W]``."""
        encoded = encoded_times(self.map_noise, noise_labels, self.map_layer0.weight)
        embedding = self.map_layer1(silu(self.map_layer0(encoded)))
        if self.map_label is not None:
            labels = one_hot(class_labels, x.shape[0], self.label_dim).to(embedding)
            embedding = embedding + self.map_label(labels)
        embedding = silu(embedding)
        skips = list[Tensor]()
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, embedding)
        out: Tensor = self.out_conv(silu(self.out_norm(x)))
        return out

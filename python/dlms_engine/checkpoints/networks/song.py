"""DDPM++ and NCSN++ (Song et al. 2021, section 4.3 and appendix H), as in Karras et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...support.versioned import Versioned
from .blocks import BlockStyle, Fourier, Norm, Positional, Resample, UNetBlock, silu


class SongUNet(Versioned, nn.Module):
    """Called as ``network(x, noise_labels, class_labels)``; arguments as in the published configs.

    Args:
        label_dim: classes, 0 for none; ``class_labels`` are one-hot ``[B, label_dim]``.
        augment_dim: augmentation labels seen in training; zero in sampling.
        embedding_type: ``"positional"`` (DDPM++) or ``"fourier"`` (NCSN++).
        encoder_type: ``"standard"`` (DDPM++), ``"residual"`` (NCSN++) or ``"skip"``.
        decoder_type: ``"standard"`` or ``"skip"``.

    Raises:
        ValueError: an unknown type.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        _one_of("embedding_type", embedding_type, ("positional", "fourier"))
        _one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _one_of("decoder_type", decoder_type, ("standard", "skip"))
        self.label_dim = label_dim
        embedding, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self._style = BlockStyle(
            embedding, dropout, False, 1, math.sqrt(0.5), 1e-6, tuple(resample_filter), True
        )
        self.map_noise: nn.Module = (
            Positional(noise, endpoint=True) if embedding_type == "positional" else Fourier(noise)
        )
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        widths = [model_channels * m for m in channel_mult]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        self._encode(
            img_resolution,
            in_channels,
            model_channels,
            widths,
            num_blocks,
            attn_resolutions,
            encoder_type,
        )
        self._decode(
            img_resolution, out_channels, widths, num_blocks, attn_resolutions, decoder_type
        )

    def _encode(
        self,
        size: int,
        inputs: int,
        first: int,
        widths: list[int],
        blocks: int,
        attended: Sequence[int],
        kind: str,
    ) -> None:
        style, width, side = self._style, first, inputs
        for level, target in enumerate(widths):
            res = size >> level
            name = f"{res}x{res}"
            if level == 0:
                self.enc[f"{name}_conv"] = Resample(inputs, first, 3)
            else:
                self.enc[f"{name}_down"] = UNetBlock(width, width, style, down=True)
                if kind == "skip":
                    self.enc[f"{name}_aux_down"] = Resample(
                        side, side, 0, down=True, taps=style.taps
                    )
                    self.enc[f"{name}_aux_skip"] = Resample(side, width, 1)
                if kind == "residual":
                    self.enc[f"{name}_aux_residual"] = Resample(
                        side, width, 3, down=True, taps=style.taps, fused=True
                    )
                    side = width
            for i in range(blocks):
                attention = res in attended
                self.enc[f"{name}_block{i}"] = UNetBlock(width, target, style, attention=attention)
                width = target

    def _decode(
        self,
        size: int,
        outputs: int,
        widths: list[int],
        blocks: int,
        attended: Sequence[int],
        kind: str,
    ) -> None:
        style, width, last = self._style, widths[-1], len(widths) - 1
        skips = [b.out_channels for n, b in self.enc.items() if "aux" not in n]
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
                attention = i == blocks and res in attended
                self.dec[f"{name}_block{i}"] = UNetBlock(joined, width, style, attention=attention)
            if kind == "skip" or level == 0:
                if kind == "skip" and level < last:
                    self.dec[f"{name}_aux_up"] = Resample(
                        outputs, outputs, 0, up=True, taps=style.taps
                    )
                self.dec[f"{name}_aux_norm"] = Norm(width, 1e-6)
                self.dec[f"{name}_aux_conv"] = Resample(width, outputs, 3)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """``x`` ``[B, C, H, W]``, ``noise_labels`` ``[B]`` -> ``[B, out_channels, H, W]``."""
        embedding = self._embed(noise_labels, class_labels)
        skips, side = list[Tensor](), x
        for name, block in self.enc.items():
            if "aux_down" in name:
                side = block(side)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(side)
            elif "aux_residual" in name:
                x = skips[-1] = side = (x + block(side)) / math.sqrt(2)
            else:
                x = block(x, embedding) if isinstance(block, UNetBlock) else block(x)
                skips.append(x)
        return self._up(x, skips, embedding)

    def _up(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        out: Tensor | None = None
        hidden = x
        for name, block in self.dec.items():
            if "aux_up" in name:
                out = block(out)
            elif "aux_norm" in name:
                hidden = block(x)
            elif "aux_conv" in name:
                shown = block(silu(hidden))
                out = shown if out is None else out + shown
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, embedding)
        assert out is not None
        return out

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        weight = self.map_layer0.weight
        cosine, sine = encoded_times(self.map_noise, noise_labels, weight).chunk(2, dim=1)
        embedding = torch.cat([sine, cosine], dim=1)
        if self.map_label is not None:
            labels = one_hot(class_labels, noise_labels.shape[0], self.label_dim).to(embedding)
            embedding = embedding + self.map_label(labels * math.sqrt(self.label_dim))
        return silu(self.map_layer1(silu(self.map_layer0(embedding))))


def encoded_times(encoder: nn.Module, times: Tensor, weight: Tensor) -> Tensor:
    """``encoder`` of ``times`` ``[B]`` in ``weight``'s dtype; its angles are never in half precision."""
    wide = torch.promote_types(times.dtype, weight.dtype)
    encoded: Tensor = encoder(times.to(torch.promote_types(wide, torch.float32)))
    return encoded.to(weight.dtype)


def one_hot(labels: Tensor | None, batch: int, count: int) -> Tensor:
    """``[B, count]`` float32 from indices ``[B]`` or one-hot rows; zeros without labels."""
    if labels is None:
        return torch.zeros(batch, count)
    if labels.ndim == 1:
        labels = torch.nn.functional.one_hot(labels.long(), count)
    if labels.shape != (batch, count):
        raise ValueError(f"class_labels are {tuple(labels.shape)}, expected [{batch}, {count}]")
    return labels


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {allowed}")

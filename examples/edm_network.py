"""The U-Net of the training examples, its EDM denoiser and pictures of its samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from augment import LABELS
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor, nn

SIGMA_DATA = 0.5
# The consistency-model code uses 1000; with only channels[0] (16) embedding channels that makes
# the fastest embedding oscillate every 0.025 in ln(sigma), i.e. noise along a sampling trajectory.
C_NOISE_SCALE = 100.0


def build_network(config: dict[str, Any], labels: bool = False) -> nn.Module:
    """The U-Net of a preset's ``size``, ``channels``, ``layers``, ``attention``, ``groups``, ``head``.

    One attention in the middle; ``attention`` names further levels ("1": the second from the top).
    The output convolution starts at 0. With ``labels`` a linear map ``augment`` of the 9
    augmentation labels is added to the time embedding; without labels the same weights are a plain
    ``UNet2DModel``, which is what zero labels give.
    """
    channels = tuple(int(c) for c in str(config["channels"]).split(","))
    levels = {int(n) for n in str(config["attention"]).split(",") if n}
    attended = [channels[n] for n in levels | {len(channels) - 1}]
    down = ["AttnDownBlock2D" if n in levels else "DownBlock2D" for n in range(len(channels))]
    up = ["AttnUpBlock2D" if n in levels else "UpBlock2D" for n in range(len(channels))]
    factory: Any = UNet2DModel  # untyped in diffusers
    network = factory(
        sample_size=config["size"],
        in_channels=3,
        out_channels=3,
        layers_per_block=config["layers"],
        block_out_channels=channels,
        down_block_types=tuple(down),
        up_block_types=tuple(reversed(up)),
        norm_num_groups=config["groups"],
        attention_head_dim=min(config["head"], *attended),
        # "fourier" would take the logarithm of c_noise, which is negative for sigma < 1.
        time_embedding_type="positional",
        class_embed_type="identity" if labels else None,
    )
    nn.init.zeros_(network.conv_out.weight)
    nn.init.zeros_(network.conv_out.bias)
    if labels:
        network.augment = nn.Linear(LABELS, 4 * channels[0], bias=False)
    built: nn.Module = network.to(memory_format=torch.channels_last)
    return built


def denoise(network: Any, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """EDM denoiser: x [B, 3, H, W] noisy, sigma [B] -> estimate of the clean image, float32.

    ``labels`` [B, 9] are the augmentation's; a network made with labels takes None as zeros.
    """
    s = sigma.view(-1, 1, 1, 1)
    total = s**2 + SIGMA_DATA**2
    told: dict[str, Tensor] = {}
    with torch.autocast(x.device.type, torch.bfloat16):
        if hasattr(network, "augment"):
            labels = x.new_zeros(len(x), LABELS) if labels is None else labels
            told["class_labels"] = network.augment(labels)
        timestep = C_NOISE_SCALE * sigma.log() / 4
        raw: Tensor = network(x / total.sqrt(), timestep, return_dict=False, **told)[0]
    return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * raw.float()


@torch.no_grad()
def draw_samples(network: Any, count: int, size: int, steps: int, seed: int) -> Tensor:
    """EDM Heun samples [count, 3, size, size] (sigma 80 -> 0.002, rho 7), on the network's device."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = [*sigmas.tolist(), 0.0]
    device = next(network.parameters()).device
    x = torch.randn(count, 3, size, size, generator=generator).to(device) * levels[0]
    x = x.to(memory_format=torch.channels_last)
    for now, after in itertools.pairwise(levels):
        slope = (x - denoise(network, x, x.new_full((count,), now))) / now
        moved = x + (after - now) * slope
        if after > 0:
            second = (moved - denoise(network, moved, x.new_full((count,), after))) / after
            moved = x + (after - now) * (slope + second) / 2
        x = moved
    return x


def sample_grid(network: Any, path: Path, size: int, rows: int, steps: int, seed: int) -> None:
    """Write a rows x rows PNG of samples, enlarged to 64 pixels each."""
    x = draw_samples(network, rows * rows, size, steps, seed).cpu()
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    tiles = pixels.reshape(rows, rows, size, size, 3).permute(0, 2, 1, 3, 4)
    picture = Image.fromarray(tiles.reshape(rows * size, rows * size, 3).contiguous().numpy())
    side = rows * size * max(1, 64 // size)
    picture.resize((side, side), Image.Resampling.NEAREST).save(path, optimize=True)

"""Train the embedded 16x16 EDM model on a folder or tar archive of images.

The network is a diffusers ``UNet2DModel``; EDM preconditioning (Karras et al. 2022) wraps it:

    D(x, sigma) = c_skip x + c_out F(c_in x, C_NOISE_SCALE * c_noise),   c_noise = ln(sigma) / 4

with sigma_data = 0.5. ``C_NOISE_SCALE`` spreads c_noise (about -1.5 .. 1.1) over the positional
embedding's frequencies, whose fastest period is 2 pi; the same constant is applied by
``dlms_engine.embedded`` when the trained weights are loaded.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \\
    python examples/train_embedded.py --data images.tar.xz --out runs/embedded --images 2000000

Interrupt at any time (Ctrl-C saves); the same command resumes bit-exactly where it stopped: the
noise, the image order and the flips of a step are functions of (seed, step) alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from image_source import load_images
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

SIGMA_DATA = 0.5
P_MEAN, P_STD = -1.2, 1.2
# The consistency-model code uses 1000; with only channels[0] (16) embedding channels that makes
# the fastest embedding oscillate every 0.025 in ln(sigma), i.e. noise along a sampling trajectory.
C_NOISE_SCALE = 100.0


def build_network(size: int, channels: tuple[int, ...]) -> nn.Module:
    """A small U-Net with one attention head in the middle; the output convolution starts at 0."""
    factory: Any = UNet2DModel  # untyped in diffusers
    network = factory(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=8,
        attention_head_dim=channels[-1],
        # "fourier" would take the logarithm of c_noise, which is negative for sigma < 1.
        time_embedding_type="positional",
    )
    nn.init.zeros_(network.conv_out.weight)
    nn.init.zeros_(network.conv_out.bias)
    built: nn.Module = network.to(memory_format=torch.channels_last)
    return built


def denoise(network: Any, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """EDM denoiser: x [B, 3, H, W] noisy, sigma [B] -> estimate of the clean image, float32."""
    s = sigma.view(-1, 1, 1, 1)
    total = s**2 + SIGMA_DATA**2
    with torch.autocast(x.device.type, torch.bfloat16):
        timestep = C_NOISE_SCALE * sigma.log() / 4
        raw: torch.Tensor = network(x / total.sqrt(), timestep, return_dict=False)[0]
    return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * raw.float()


def sample_grid(network: Any, path: Path, size: int, rows: int, steps: int, seed: int) -> None:
    """Write a rows x rows PNG of EDM Heun samples (sigma 80 -> 0.002, rho 7), enlarged 4x."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = [*sigmas.tolist(), 0.0]
    count = rows * rows
    x = torch.randn(count, 3, size, size, generator=generator) * levels[0]
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for now, after in itertools.pairwise(levels):
            slope = (x - denoise(network, x, torch.full((count,), now))) / now
            moved = x + (after - now) * slope
            if after > 0:
                second = (moved - denoise(network, moved, torch.full((count,), after))) / after
                moved = x + (after - now) * (slope + second) / 2
            x = moved
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    tiles = pixels.reshape(rows, rows, size, size, 3).permute(0, 2, 1, 3, 4)
    picture = Image.fromarray(tiles.reshape(rows * size, rows * size, 3).contiguous().numpy())
    picture.resize((rows * size * 4, rows * size * 4), Image.Resampling.NEAREST).save(path)


def batch_for(
    images: np.ndarray, step: int, batch: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean images in [-1, 1] [B, 3, H, W], unit noise like them and sigma [B] of one step."""
    per_epoch = len(images) // batch
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(images))
    chosen = images[order[position * batch : (position + 1) * batch]]
    generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
    clean = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
    flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    clean = torch.where(flip, clean.flip(3), clean).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(clean.shape, generator=generator)
    sigma = (P_MEAN + P_STD * torch.randn(batch, generator=generator)).exp()
    return clean, noise.contiguous(memory_format=torch.channels_last), sigma


def learning_rate(seen: int, budget: int, peak: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` images, then a cosine to zero at ``budget`` images."""
    progress = min(1.0, max(0.0, (seen - warmup) / max(1, budget - warmup)))
    return peak * min(1.0, seen / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


class State:
    """Everything a resumed run needs: network, EMA copy, Adam moments, step and loss history."""

    def __init__(self, network: nn.Module, ema: nn.Module, peak: float) -> None:
        self.network, self.ema, self.step = network, ema, 0
        self.history: list[tuple[int, float]] = []  # (images seen, mean loss since the last)
        self.seconds = 0.0
        self.optimizer = torch.optim.Adam(network.parameters(), peak, betas=(0.9, 0.99), fused=True)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """One safetensors file holding tensors and, as metadata, the json state: one atomic
        ``os.replace`` keeps the two from ever disagreeing."""
        tensors = {f"net.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slot.items()}
        tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
        record = {"step": self.step, "history": self.history, "seconds": self.seconds, **facts}
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"state": json.dumps(record)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)

    def load(self, path: Path, facts: dict[str, Any]) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as handle:
            record = json.loads(handle.metadata()["state"])
        changed = {k: (record.get(k), v) for k, v in facts.items() if record.get(k) != v}
        if changed:
            raise ValueError(f"{path} was written with other settings (stored, given): {changed}")
        tensors = load_file(path)
        part: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("net", "ema", "adam")}
        for key, value in tensors.items():
            head, _, rest = key.partition(".")
            part[head][rest] = value
        self.network.load_state_dict(part["net"])
        self.ema.load_state_dict(part["ema"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        trained = list(self.network.parameters())
        for key, value in part["adam"].items():
            index, _, name = key.partition(".")
            if name != "step":
                # The fused Adam walks raw memory: moments must be laid out as their parameter is.
                value = torch.empty_like(trained[int(index)]).copy_(value)
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.seconds = record["step"], record["seconds"]
        self.history = [(int(a), float(b)) for a, b in record["history"]]


def plot_loss(history: list[tuple[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot([a / 1e6 for a, _ in history], [b for _, b in history], linewidth=0.8)
    axis.set(xlabel="images seen (millions)", ylabel="EDM loss", yscale="log")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    images, _, _ = load_images(args.data, args.size, args.include, args.out / "images.npz")
    channels = tuple(int(c) for c in args.channels.split(","))
    network, ema = build_network(args.size, channels), build_network(args.size, channels)
    ema.load_state_dict(network.state_dict())
    ema.requires_grad_(False)
    state = State(network, ema, args.lr)
    facts = {k: getattr(args, k) for k in ("seed", "batch", "channels", "size", "lr", "images")}
    checkpoint = args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint, facts)
    fast = torch.compile(network) if args.compile else network
    averaged, trained = list(ema.parameters()), list(network.parameters())
    stop = False

    def on_signal(_signum: int, _frame: object) -> None:
        nonlocal stop
        stop = True  # finish the running step, then save

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    total = math.ceil(args.images / args.batch)
    began = saved = gridded = time.monotonic()
    spent = state.seconds
    losses: list[float] = []
    bar = tqdm(total=total * args.batch, initial=state.step * args.batch, unit="img", mininterval=5)
    while state.step < total and not stop:
        seen = state.step * args.batch
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(seen, args.images, args.lr, args.warmup)
        clean, noise, sigma = batch_for(images, state.step, args.batch, args.seed)
        s = sigma.view(-1, 1, 1, 1)
        weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
        estimate = denoise(fast, clean + s * noise, sigma)
        loss = (weight * (estimate - clean) ** 2).mean()
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        state.optimizer.step()
        # Ramp-up (EDM): the half-life never exceeds 5% of what has been seen.
        half_life = max(1.0, min(args.ema_half_life, 0.05 * seen))
        torch._foreach_lerp_(averaged, trained, 1 - 0.5 ** (args.batch / half_life))
        state.step += 1
        losses.append(loss.item())
        bar.update(args.batch)
        now = time.monotonic()
        if len(losses) == 100 or state.step == total:
            state.history.append((state.step * args.batch, float(np.mean(losses))))
            bar.set_postfix(loss=f"{state.history[-1][1]:.4f}")
            losses = []
        state.seconds = spent + now - began
        if now - saved > args.save_every or stop or state.step == total:
            state.save(checkpoint, facts)
            saved = now
        if now - gridded > args.grid_every or state.step == total:
            name = args.out / f"samples_{state.step * args.batch:08d}.png"
            sample_grid(ema, name, args.size, 8, 18, args.seed)
            plot_loss(state.history, args.out / "loss.png")
            gridded = now
    bar.close()
    state.save(checkpoint, facts)
    print(f"{state.step * args.batch} images in {state.seconds:.0f} s; checkpoint {checkpoint}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="image folder or tar archive")
    parser.add_argument("--include", default="", help="keep names containing this, e.g. /train/")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--images", type=int, default=2_000_000, help="images to see in total")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--channels", default="16,64")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak Adam learning rate")
    parser.add_argument("--warmup", type=int, default=30_000, help="warm-up, in images")
    parser.add_argument("--ema-half-life", type=float, default=50_000, help="in images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    parser.add_argument("--grid-every", type=float, default=300, help="seconds")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

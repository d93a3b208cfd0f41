"""Stage: seconds to distil DLMS at 5 evaluations on a 32x32 model, validation and all.

The model is `cifar10-32` where it has been made (`benchmarks/models`, DLMS_MODELS). Otherwise it is a
U-Net of its size with random weights: that takes as long and learns nothing worth having, and the
report says so.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import checks
import models
import torch
from torch import Tensor, nn

import dlms_engine as dlms

SHAPE = (3, 32, 32)
SETTINGS: dict[str, Any] = {
    "prediction": "noise",
    "init": "ipndm",
    "grid": "polynomial",
    "time_range": 1.0,
    "teacher_interpolation": 2,
    "last_step": "features",
    "score": "product",
    "endpoint_share": 0.85,
    "lr": 1e-2,
    "decay": "cosine",
    "warmup": 5,
    "ema_kimg": (0.25, 0.5, 1.0),
}
"""Those of the preset dlms-embedded."""


class Preconditioned(nn.Module):
    """``network(x, c_noise)`` over a diffusers U-Net, as EDM preconditioning calls it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """F ``[B, 3, 32, 32]``."""
        output: Tensor = self.unet(x, 100.0 * c_noise, return_dict=False)[0]
        return output


class Means(nn.Module):
    """Features of an untrained model: the means of 4x4 blocks."""

    num_features = 192

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4).flatten(1)


def untrained(device: str) -> tuple[Any, nn.Module]:
    """A U-Net of 13 million parameters with random weights, and features."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    )
    network = Preconditioned(unet).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.eval().requires_grad_(False)
    process = dlms.processes.EDM(0.002, 80.0)
    denoiser = dlms.Denoiser(network, process, "edm", sigma_data=0.5, features="unet.mid_block")
    return denoiser, Means().to(device)


def model(name: str, device: str) -> tuple[str, Any, nn.Module, tuple[int, ...]]:
    """(what it is, denoiser, features, shape)."""
    if name == "tiny":
        denoiser, features, shape = models.load(name, device)
        return "tiny", denoiser, features, shape
    from dlms_engine.lab import benchmark_model

    try:
        loaded = benchmark_model.load("cifar10-32")
    except FileNotFoundError:
        return "random weights, 13 million parameters", *untrained(device), SHAPE
    return "cifar10-32", loaded.denoiser, loaded.features, loaded.shape


def distil(name: str, device: str, trajectories: int) -> dict[str, Any]:
    """Wall time of the call, from loaded model to solver."""
    what, denoiser, features, shape = model(name, device)
    dlms.Sampler(
        denoiser, dlms.solvers.ddim(denoiser.process, dlms.grids.logsnr(denoiser.process, 2))
    ).to(device).sample(
        range(32), shape
    )  # the libraries' handles and the choice of kernels are not distilling
    checks.synchronize(device)
    start = time.perf_counter()
    solver = dlms.distill(
        denoiser, "dlms", nfe=5, shape=shape, trajectories=trajectories, progress=False,
        feature_network=features, **SETTINGS,
    )  # fmt: skip
    checks.synchronize(device)
    seconds = time.perf_counter() - start
    scores = [entry["score"] for entry in solver.history if "score" in entry]
    parameters = sum(p.numel() for p in denoiser.parameters())
    return {
        "seconds": seconds,
        "model": what,
        "trained": what == "cifar10-32",
        "parameters": parameters,
        "trajectories": trajectories,
        "score_before": scores[0] if scores else None,
        "score_after": solver.best.get("score"),
        "limit_seconds": 60.0,
    }


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--model", choices=("benchmark", "tiny"), default="benchmark")
    parser.add_argument("--trajectories", type=int, default=3_200)
    args = parser.parse_args()
    run = checks.Checks("distil-32", args.output, args.seconds, device=args.device)
    run.run(
        f"DLMS, 5 evaluations, {args.trajectories} trajectories",
        lambda: distil(args.model, args.device, args.trajectories),
    )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

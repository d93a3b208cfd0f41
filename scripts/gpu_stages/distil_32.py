"""Stage: seconds to distil DLMS at 5 evaluations on a 32x32 model, validation and all.

The model is `cifar10-32` where it has been made (`benchmarks/models`, DLMS_MODELS). Otherwise it is a
U-Net of its size with random weights: that takes as long and learns nothing worth having, and the
report says so.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

import checks
import models
import stand_in
import torch
from torch import nn

import dlms_engine as dlms
from dlms_engine.models.features import ResidualFeatures
from dlms_engine.models.unet import UNet

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


def untrained(device: str) -> tuple[Any, nn.Module]:
    """The benchmark model's U-Net and feature network with random weights."""
    torch.manual_seed(0)
    network, features = UNet(), ResidualFeatures()
    nn.init.normal_(network.conv_out.weight, std=0.01)  # zero at first, as for training
    for each in (network, features):
        each.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        each.eval().requires_grad_(False)
    process = dlms.processes.EDM(0.002, 80.0)
    denoiser = dlms.Denoiser(network, process, "edm", sigma_data=0.5, features="mid_block")
    return denoiser, features


def model(name: str, device: str) -> tuple[str, Any, nn.Module, tuple[int, ...]]:
    """(what it is, denoiser, features, shape)."""
    if name == "tiny":
        denoiser, features, shape = models.load(name, device)
        return "tiny", denoiser, features, shape
    from dlms_engine.lab import benchmark_model

    try:
        if name == "untrained":
            raise FileNotFoundError(name)
        loaded = benchmark_model.load_benchmark_model("cifar10-32")
    except FileNotFoundError:
        return "random weights", *untrained(device), SHAPE
    return "cifar10-32", loaded.denoiser, loaded.features, loaded.shape


def distil(name: str, device: str, trajectories: int, capture: bool) -> dict[str, Any]:
    """Wall time of the call, from loaded model to solver."""
    what, denoiser, features, shape = model(name, device)
    dlms.Sampler(
        denoiser, dlms.solvers.ddim(denoiser.process, dlms.grids.logsnr(denoiser.process, 2))
    ).to(device).sample(
        range(32), shape
    )  # the libraries' handles and the choice of kernels are not distilling
    checks.synchronize(device)
    start = time.perf_counter()
    with stand_in.graphs(device) if capture else nullcontext():
        solver = dlms.distill(
            denoiser, "dlms", nfe=5, shape=shape, trajectories=trajectories, progress=False,
            feature_network=features, capture=capture, **SETTINGS,
        )  # fmt: skip
    checks.synchronize(device)
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in denoiser.parameters())
    return {
        "seconds": seconds,
        "model": what,
        "trained": what == "cifar10-32",
        "parameters": parameters,
        "trajectories": trajectories,
        "captured": capture,
        "score_before": solver.history[0]["validation/raw"],
        "score_after": solver.best["score"],
        "limit_seconds": 60.0,
    }


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--model", choices=("benchmark", "untrained", "tiny"), default="benchmark")
    parser.add_argument("--trajectories", type=int, default=3_200)
    parser.add_argument("--capture", action="store_true", help="with captured evaluations")
    args = parser.parse_args()
    name = "distil-32-captured" if args.capture else "distil-32"
    run = checks.Checks(name, args.output, args.seconds, device=args.device)
    run.run(
        f"DLMS, 5 evaluations, {args.trajectories} trajectories",
        lambda: distil(args.model, args.device, args.trajectories, args.capture),
    )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

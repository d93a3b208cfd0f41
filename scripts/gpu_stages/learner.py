"""Stage: one learner, a few updates on the GPU, and a sample of what it learned.

The seconds are those of a machine that does other things at the same time; `bench distill` measures.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checks
import models
import torch

import dlms_engine as dlms

SMALL: dict[str, Any] = {"validation_samples": 16, "validation_steps": 12, "validate_every": 0}


def trained(n: int) -> dict[str, Any]:
    """n updates of the shared trainer."""
    return {"trajectories": 32 * n, "batch": 32, **SMALL}


LEARNERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "dlms": lambda n: {**trained(n), "last_step": "features"},
    "dlms-noise": lambda n: {
        **trained(n),
        **{"method": "dlms", "prediction": "noise", "init": "ipndm", "grid": "polynomial"},
        **{"endpoint_share": 0.5, "last_step": "features", "score": "product"},
    },
    "amed": trained,
    "amed-plugin": lambda n: {**trained(n), "method": "amed", "solver": "ipndm"},
    # a round is train / batch updates of the steps, another with the network times
    "ld3": lambda n: {"trajectories": max(2, n), "validation": 4, "rounds": 1, "rounds_times": 1},
    "dode": lambda n: {"trajectories": 4 * n},  # a fit, not updates
    "gits": lambda n: {"trajectories": 4 * n},  # a search, not updates
    "free_table": lambda n: {**trained(n), "last_step": "features"},
    "auto": lambda n: {},
}
"""name -> number of updates -> arguments of `distill`; the method is the name unless it says."""


def distil(name: str, model: str, device: str, updates: int) -> dict[str, Any]:
    """AssertionError unless what comes back is finite, on the device, and survives its file."""
    settings = LEARNERS[name](updates)
    method = settings.pop("method", name)
    if method not in dlms.learners.LEARNERS:
        raise checks.Absent(f"there is no method {method!r}")
    denoiser, features, shape = models.load(model, device)
    if settings.get("last_step") == "features" or method in ("ld3", "auto"):
        settings["feature_network"] = features
    checks.synchronize(device)
    start = time.perf_counter()
    solver = dlms.distill(denoiser, method, nfe=5, shape=shape, progress=False, seed=0, **settings)
    checks.synchronize(device)
    seconds = time.perf_counter() - start
    sample = dlms.Sampler(denoiser, solver).to(device).sample(range(4), shape)
    if sample.device.type != torch.device(device).type or not sample.isfinite().all():
        raise AssertionError(f"samples on {sample.device}, finite {bool(sample.isfinite().all())}")
    with tempfile.TemporaryDirectory() as folder:
        again = dlms.load_solver(solver.save(Path(folder) / "solver.safetensors"))
    other = dlms.Sampler(denoiser, again).to(device).sample(range(4), shape)
    off = float((other - sample).abs().max() / sample.abs().max())
    if not off <= 1e-5:
        raise AssertionError(f"the loaded solver's samples differ by {off:.3e}")
    score = solver.best.get("score")
    if score is not None and not math.isfinite(float(score)):
        raise AssertionError(f"the score is {score}")
    figures = {"seconds": seconds, "nfe": solver.nfe, "logged": len(solver.history)}
    figures |= {"score": score, "settings": {k: str(v)[:60] for k, v in settings.items()}}
    if device != "cpu":
        figures["peak_MB"] = torch.cuda.max_memory_allocated() / 1e6
    return figures


def main() -> int:
    parser: argparse.ArgumentParser = checks.options(__doc__ or "")
    parser.add_argument("--method", choices=sorted(LEARNERS), required=True)
    parser.add_argument("--model", choices=("embedded", "tiny"), default="embedded")
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = checks.Checks(
        f"learner-{args.method}", args.output, args.seconds, device=args.device, model=args.model
    )
    run.run(
        f"{args.method}, {args.updates} updates",
        lambda: distil(args.method, args.model, args.device, args.updates),
    )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

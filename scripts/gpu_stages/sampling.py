"""Stage: `Sampler.sample` on the GPU against the CPU, on the embedded model."""

from __future__ import annotations

import sys
from typing import Any

import checks
import models
import torch

from dlms_engine import Sampler, grids, solvers

SEEDS, NFE = range(8), 6
FLOAT32 = 2e-3
"""Largest entry of a difference over the largest entry: other sums in convolutions, six times."""
HALF = 0.1


def samples(
    model: str, device: str, policy: str, dtype: torch.dtype = torch.float32, batch: int = 8
) -> torch.Tensor:
    """``[8, ...]`` on the CPU, in batches."""
    from designer_cases import make_policy

    denoiser, _, shape = models.load(model, device, dtype)
    process = denoiser.process
    if policy == "table":
        made: Any = solvers.ipndm(process, grids.polynomial(process, NFE))
    else:
        made = make_policy(process)
    sampler = Sampler(denoiser, made).to(device)
    seeds = list(SEEDS)
    parts = [sampler.sample(seeds[i : i + batch], shape).cpu() for i in range(0, len(seeds), batch)]
    return torch.cat(parts)


def off(got: torch.Tensor, want: torch.Tensor, limit: float) -> dict[str, Any]:
    """The largest difference over the largest entry; AssertionError above ``limit``."""
    if not got.isfinite().all():
        raise AssertionError("samples are not finite")
    value = float((got - want).abs().max() / want.abs().max())
    if not value <= limit:
        raise AssertionError(f"differs by {value:.3e} of the largest entry, more than {limit:g}")
    return {"largest_difference": value, "limit": limit}


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--model", choices=("embedded", "tiny"), default="embedded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # the CPU has no such rounding
    run = checks.Checks("sampling", args.output, args.seconds, device=args.device, model=args.model)
    model, device = args.model, args.device
    for policy in ("table", "dlms"):
        run.run(
            f"{policy}, as on the CPU",
            lambda: off(samples(model, device, policy), samples(model, "cpu", policy), FLOAT32),  # noqa: B023
        )
        run.run(
            f"{policy}, a seed's sample whatever the batch",
            lambda: off(
                samples(model, device, policy, batch=3),  # noqa: B023
                samples(model, device, policy),  # noqa: B023
                FLOAT32,
            ),
        )
    if model == "embedded":
        for dtype in (torch.bfloat16, torch.float16):
            run.run(
                f"table, {str(dtype).removeprefix('torch.')} network",
                lambda: off(
                    samples(model, device, "table", dtype),  # noqa: B023
                    samples(model, device, "table"),
                    HALF,
                ),
            )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

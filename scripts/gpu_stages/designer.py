"""Stage: the row of a DLMS policy by its Triton kernel, against the torch operations."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import checks
import torch
from designer_cases import DISCRETE, EDM, both, make_denoiser, make_policy

BATCHES = (1, 3, 17)


def check(device: str, process: Any, prediction: str, batch: int) -> dict[str, Any]:
    """Every row and noise level of a run, in float64, to 1e-12."""
    policy = make_policy(process, prediction=prediction)
    want, got = both(device, policy, make_denoiser(process, prediction), batch)
    worst = 0.0
    for (row, level), (expected, expected_level) in zip(got, want, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-12, atol=1e-13)
        worst = max(worst, float((row - expected).abs().max()))
        if row is not got[-1][0]:  # no evaluation follows the last row
            torch.testing.assert_close(level, expected_level, rtol=1e-12, atol=1e-13)
    return {"rows": len(got), "largest_difference": worst}


def main() -> int:
    args = checks.options(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    run = checks.Checks("designer", args.output, args.seconds, device=args.device)
    for process, prediction, batch in itertools.product(
        (EDM, DISCRETE), ("data", "noise"), BATCHES
    ):
        run.run(
            f"{process.name}, {prediction}, batch {batch}",
            lambda: check(args.device, process, prediction, batch),  # noqa: B023
        )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

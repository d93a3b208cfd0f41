"""Stage: updates with captured evaluations are those without, and what each way takes.

The seconds are those of a machine that does other things at the same time; `bench distill --capture`
measures.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from typing import Any

import checks
import models
import stand_in
import torch
from learner import LEARNERS

import dlms_engine as dlms
from dlms_engine.engine import captured_calls

STARTS: dict[str, dict[str, Any]] = {
    "dlms": {"init": "ab", "grid": "polynomial"},
    "amed": {"solver": "ipndm"},
    "free_table": {"base": "ipndm", "grid": "polynomial"},
}
"""Where they begin: finding that out would take longer than the updates."""
TOLERANCE = 2e-2
"""Of a loss after some updates: each takes up the rounding of those before it."""


def distilled(name: str, model: str, device: str, updates: int, capture: bool) -> dict[str, Any]:
    """Losses of the updates and the seconds of the call."""
    settings = {**LEARNERS[name](updates), **STARTS.get(name, {})}
    method = settings.pop("method", name)
    denoiser, features, shape = models.load(model, device)
    if settings.get("last_step") == "features" or method == "ld3":
        settings["feature_network"] = features
    checks.synchronize(device)
    start = time.perf_counter()
    solver = dlms.distill(
        denoiser, method, nfe=5, shape=shape, progress=False, seed=0, capture=capture, **settings
    )
    checks.synchronize(device)
    seconds = time.perf_counter() - start
    losses = [float(e["loss"]) for e in solver.history if "loss" in e]
    return {"seconds": seconds, "losses": losses, "score": float(solver.best["score"])}


def both(name: str, model: str, device: str, updates: int) -> dict[str, Any]:
    """AssertionError unless both ways log the same losses and find solvers of the same score."""
    seen: list[captured_calls.CapturedCalls] = []
    made = captured_calls.CapturedCalls.__init__

    @functools.wraps(made)
    def noted(calls: Any, *arguments: Any) -> None:
        made(calls, *arguments)
        seen.append(calls)

    plain = distilled(name, model, device, updates, False)
    captured_calls.CapturedCalls.__init__ = noted  # type: ignore[method-assign]
    try:
        with stand_in.graphs(device):
            captured = distilled(name, model, device, updates, True)
    finally:
        captured_calls.CapturedCalls.__init__ = made  # type: ignore[method-assign]
    pairs = list(zip(plain["losses"], captured["losses"], strict=True))
    pairs.append((plain["score"], captured["score"]))
    for number, (one, other) in enumerate(pairs):
        if not math.isclose(one, other, rel_tol=TOLERANCE):
            raise AssertionError(f"number {number} of {len(pairs)}: {one:.6g} and {other:.6g}")
    stats = seen[0].graphs.stats()
    if seen[0].refused or stats["failures"] or not stats["replays"]:
        raise AssertionError(f"not captured, see the log: {stats}")
    return {
        "seconds_plain": plain["seconds"],
        "seconds_captured": captured["seconds"],
        "apart": max(abs(a - b) / abs(a) for a, b in pairs),
        **{name: stats[name] for name in ("captures", "replays", "evictions")},
    }


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--model", choices=("embedded", "tiny"), default="embedded")
    parser.add_argument("--updates", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = checks.Checks("learners-captured", args.output, args.seconds, device=args.device)
    for name in ("dlms", "dlms-noise", "amed", "free_table", "ld3"):
        run.run(name, lambda: both(name, args.model, args.device, args.updates))  # noqa: B023
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

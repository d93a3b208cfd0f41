"""``dlms bench distill``: updates per second of every learner where the network lives.

    python -m dlms_engine.lab.bench distill --device cuda --output distill.json --each 8

Two models: the embedded one, and a 32x32 U-Net of the benchmark model's size with random weights,
which takes as long as a trained one. DLMS, AMED, LD3 and the free table are timed from one finished
update to the next, validation left out; D-ODE's fit and GITS's search are one piece each and are timed
whole. A learner that fails leaves its error in the report, and the others go on. ``--capture`` times each
learner twice, the second time with captured evaluations (``distill(capture=True)``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from dlms_engine import ops
from dlms_engine.engine.captured_calls import captured_calls
from dlms_engine.lab.bench.device import no_gpu, quantiles
from dlms_engine.lab.bench.timing import (
    conditions,
    finish_report,
    json_options,
    machine,
    measure_within,
    save_report,
    say_not_measured,
)
from dlms_engine.learners import LEARNERS, RunOptions
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

_NFE = 5
MODELS = ("embedded", "unet-32")
SHORT: dict[str, Any] = {"validation_samples": 8, "validation_steps": 8}
TRAINED: dict[str, Any] = {"trajectories": 1 << 20, "validate_every": 0, **SHORT}
"""More updates than there is time for; validation only where a run begins."""


class _Case(NamedTuple):
    """What is timed."""

    label: str
    method: str
    settings: dict[str, Any]
    trained: bool = True  # update by update; else the whole call


def cases(batch: int) -> tuple[_Case, ...]:
    """Every learner; DLMS in both of its phases."""
    shared = {**TRAINED, "batch": batch}
    return (
        _Case("dlms", "dlms", {**shared, "last_step": "bottleneck"}),
        _Case("dlms, endpoint phase", "dlms", {**shared, "endpoint_share": 1.0}),
        _Case("amed", "amed", shared),
        _Case("free_table", "free_table", shared),
        _Case("ld3", "ld3", {"batch": 2, "train": 64, "validation": 4, "rounds": 1 << 20}),
        _Case("dode", "dode", {"batch": batch}, False),
        _Case("gits", "gits", {"batch": batch, "points": 21}, False),
    )


class Enough(Exception):
    """The time for one learner is up."""


@dataclass
class Clock:
    """A monitor that notes when each update was finished, and stops the run."""

    device: torch.device
    seconds: float
    times: list[float] = field(default_factory=list)

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        """Called by a learner after update ``step``; 0 is the validation before the first."""
        if step == 0:
            return
        wait(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) > WARM + 2 and self.times[-1] - self.times[0] > self.seconds:
            raise Enough

    def close(self) -> None:
        """Nothing to close."""


WARM = 2
"""Updates that are not counted: kernels are chosen and memory is taken in them."""


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.lru_cache(maxsize=1)
def _load(name: str, device: torch.device) -> tuple[Denoiser, tuple[int, ...]]:
    """The model on ``device`` and the shape of a sample."""
    if name == "embedded":
        from dlms_engine.models.embedded import IMAGE_SHAPE, load_embedded

        return load_embedded(device), IMAGE_SHAPE
    from dlms_engine.models.unet import UNet

    torch.manual_seed(0)
    network = UNet(32, (64, 128, 256), 2, (1,))
    for layer in network.modules():  # what starts as 0 would leave the rest without effect
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.eval().requires_grad_(False)
    return Denoiser(network, EDM(), "edm", features="mid_block"), (3, 32, 32)


def time_case(
    denoiser: Denoiser, shape: tuple[int, ...], case: _Case, seconds: float
) -> dict[str, Any]:
    """Updates (or whole calls) per second, by the median."""
    run = LEARNERS[case.method].run
    clock = Clock(denoiser.device, seconds)

    def options() -> RunOptions:
        settings = dict(case.settings)
        count = settings.pop("trajectories", None) if case.trained else settings["batch"]
        silent: dict[str, Any] = {"output": None, "resume": False, "progress": False, "seed": 0}
        extra: dict[str, Any] = {"monitor": clock} if case.trained else {}
        return RunOptions(nfe=_NFE, trajectories=count, settings=settings, **silent, **extra)

    if case.trained:
        with contextlib.suppress(Enough):
            run(denoiser, shape, options())
        stamps = clock.times[WARM:]
    else:
        stamps = [time.perf_counter()]
        while len(stamps) < WARM + 2 or stamps[-1] - stamps[0] < seconds:
            run(denoiser, shape, options())
            wait(denoiser.device)
            stamps.append(time.perf_counter())
        stamps = stamps[1:]
    p20, p50, p80 = quantiles([b - a for a, b in itertools.pairwise(stamps)])
    return {
        "updates_per_s": 1 / p50,
        "unit": "update" if case.trained else f"whole {case.method}",
        "p20_ms": 1e3 * p20,
        "p50_ms": 1e3 * p50,
        "p80_ms": 1e3 * p80,
        "updates": len(stamps) - 1,
    }


def _row(name: str, case: _Case, capture: bool, args: argparse.Namespace) -> dict[str, Any]:
    """What one learner does on one model, or why it failed."""
    label = f"{case.label}, captured" if capture else case.label
    row: dict[str, Any] = {"method": label, "model": name, "device": args.device}
    row |= {"batch": case.settings["batch"], "capture": capture}
    try:
        denoiser, shape = _load(name, torch.device(args.device))
        if not capture:
            return row | time_case(denoiser, shape, case, args.each)
        with captured_calls(denoiser) as calls:
            row |= time_case(denoiser, shape, case, args.each)
            return row | {"graphs": calls.graphs.stats(), "refused": calls.refused}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}


def bench_distill(argv: list[str] | None = None) -> int:
    """Command line. Status 2 if the device is not there, 1 if a learner failed."""
    parser = argparse.ArgumentParser(prog="dlms bench distill", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--each", type=float, default=5.0, help="seconds for each learner and model, start apart"
    )
    parser.add_argument("--batch", type=int, default=32, help="trajectories an update (LD3: 2)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=sorted(LEARNERS), default=[])
    parser.add_argument(
        "--capture", action="store_true", help="time captured evaluations beside plain ones"
    )
    json_options(parser)
    args = parser.parse_args(argv)
    cuda = torch.device(args.device).type == "cuda"
    if (cuda or args.capture) and no_gpu(parser.prog):
        return 2
    if args.capture and not cuda:
        parser.error(f"--capture: evaluations cannot be captured on {args.device}")
    report: dict[str, Any] = {
        "benchmark": "distill",
        "machine": machine() if cuda else conditions(),
        "backends": ops.available(args.device),
        "nfe": _NFE,
        "seconds": args.each,
        "rows": [],
    }

    def measure(case: tuple[str, _Case, bool]) -> None:
        row = _row(*case, args)
        report["rows"].append(row)
        save_report(report, args)  # a run that is cut short has given what it measured
        if not args.json:
            _show(row)

    wanted = [case for case in cases(args.batch) if not args.methods or case.method in args.methods]
    ways = (False, True) if args.capture else (False,)
    work = list(itertools.product(args.models, wanted, ways))
    left = measure_within(args.seconds, work, measure)
    missing = [f"{name}: {case.label}{', captured' * way}" for name, case, way in left]
    say_not_measured(report, missing, args)
    finish_report(report, args)
    return int(not report["rows"] or any("error" in row for row in report["rows"]))


def _show(row: dict[str, Any]) -> None:
    """One line of the table."""
    said = row.get("error") or f"{row['updates_per_s']:8.2f} a second ({row['unit']})"
    print(f"{row['model']:10} {row['method']:30} batch {row['batch']:3}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(bench_distill())

"""``dlms bench allocator``: a network's evaluation on the CPU, with freed memory kept and without.

    dlms bench allocator --model embedded --batches 16,64
    dlms bench allocator --model examples.published_score_network:hsc64

What ``distill``, ``recommend`` and the commands do by themselves (``support.allocator``), measured: the
two sides in turn, each round in a process of its own. Page faults are the kernel's count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlms_engine.lab.any_model import model_called
from dlms_engine.lab.bench.timing import (
    conditions,
    finish_report,
    json_options,
    measure_within,
    say_not_measured,
)
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.support.allocator import freed_memory_kept


@torch.no_grad()
def _one_side(model: str, side: str, batches: list[int], calls: int) -> list[list[float]]:
    """(milliseconds, page faults) an evaluation of one sample, for each batch."""
    if model != "embedded" and ":" not in model:
        raise ValueError(f"model is {model!r}, expected 'embedded' or module:function")
    denoiser, shape, _ = model_called(model, Path())
    found = []
    with freed_memory_kept() if side == "kept" else contextlib.nullcontext():
        for batch in batches:
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
            t = torch.full((batch,), denoiser.process.t_max / 2, dtype=torch.float64)
            found.append(list(_round(denoiser, x, t, calls)))
    return found


def _in_a_process(model: str, side: str, batches: str, calls: int) -> list[list[float]]:
    """``_one_side`` in a fresh one: glibc's thresholds adapt to what a process has freed before."""
    command = [sys.executable, "-m", "dlms_engine.lab.bench", "allocator", "--model", model]
    command += ["--side", side, "--batches", batches, "--calls", str(calls)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr.strip().splitlines()[-1] if made.stderr else "it was killed")
    found: list[list[float]] = json.loads(made.stdout.splitlines()[-1])
    return found


def medians_of(
    batches: list[int], measured: dict[str, list[list[list[float]]]]
) -> list[dict[str, float]]:
    """Medians over the rounds, and how many times as long the usual way takes."""
    rows = []
    for number, batch in enumerate(batches):
        row: dict[str, float] = {"batch": batch}
        for side, rounds in measured.items():
            for place, name in enumerate(("ms", "faults")):
                row[f"{side}_{name}"] = statistics.median(r[number][place] for r in rounds)
        row["ratio"] = row["usual_ms"] / row["kept_ms"]
        rows.append(row)
    return rows


def _round(denoiser: Denoiser, x: Tensor, t: Tensor, calls: int) -> tuple[float, float]:
    """(milliseconds, page faults) an evaluation of one sample, after one call to warm up."""
    denoiser.predict(x, t)
    faults, started = _page_faults(), time.perf_counter()
    for _ in range(calls):
        denoiser.predict(x, t)
    seconds = time.perf_counter() - started
    faults = _page_faults() - faults
    return 1e3 * seconds / (calls * len(x)), faults / (calls * len(x))


def _page_faults() -> int:
    """Of this process so far."""
    try:
        import resource
    except ImportError:
        raise ImportError("page faults are counted on Linux and macOS only") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def bench_allocator(arguments: list[str]) -> int:
    """Runs the benchmark; returns its exit status."""
    parser = argparse.ArgumentParser(prog="dlms bench allocator", description=__doc__)
    parser.add_argument("--model", default="embedded", help="or module:function")
    parser.add_argument("--batches", default="16,64", help="samples at a time, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=8, help="a round")
    parser.add_argument(
        "--side", choices=("usual", "kept"), help="one side in this process, as JSON"
    )
    json_options(parser)
    options = parser.parse_args(arguments)
    try:
        batches = [int(each) for each in options.batches.split(",")]
        if options.side:
            print(json.dumps(_one_side(options.model, options.side, batches, options.calls)))
            return 0
    except (ImportError, AttributeError, ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    measured: dict[str, list[list[list[float]]]] = {"usual": [], "kept": []}
    report: dict[str, Any] = {
        "benchmark": "allocator", "model": options.model, "conditions": conditions(),
    }  # fmt: skip

    def one(side: str) -> None:
        measured[side].append(_in_a_process(options.model, side, options.batches, options.calls))

    try:
        left = measure_within(options.seconds, ["usual", "kept"] * options.rounds, one)
    except RuntimeError as error:
        parser.error(str(error))
    report["rows"] = medians_of(batches, measured) if all(measured.values()) else []
    say_not_measured(report, left, options)
    if not finish_report(report, options):
        for row in report["rows"]:
            print(
                f"{options.model}, batch {row['batch']}: {row['usual_ms']:.3f} -> {row['kept_ms']:.3f} "
                f"ms an evaluation of one sample ({row['ratio']:.2f}x), page faults "
                f"{row['usual_faults']:.0f} -> {row['kept_faults']:.0f}"
            )
    return 0

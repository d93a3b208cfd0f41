"""Timing shared by the benchmarks: interleaved rounds, medians, and the machine they ran on."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from dlms_engine import __version__, ops
from dlms_engine.support.files import require_writable, write_text

_Case = TypeVar("_Case")


def interleaved(
    candidates: dict[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Microseconds per call of each candidate: `best` (lowest round median), `median`, `p80`.

    A round times every candidate in turn for about `seconds`, so that a busy phase of the machine
    falls on all of them. The lowest round median is the figure that other load disturbs least.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for call in candidates.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in candidates.items():
            samples[name].append(_round(call, seconds))
    result = {}
    for name, per_round in samples.items():
        medians = [statistics.median(r) for r in per_round]
        pooled = sorted(value for r in per_round for value in r)
        result[name] = {
            "best": min(medians),
            "median": statistics.median(pooled),
            "p80": pooled[int(0.8 * (len(pooled) - 1))],
            "repeats": len(pooled),
        }
    return result


def _round(call: Callable[[], object], seconds: float) -> list[float]:
    values: list[float] = []
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while (start := time.perf_counter_ns()) < end or len(values) < 5:
        call()
        values.append((time.perf_counter_ns() - start) / 1e3)
    return values


def conditions() -> dict[str, Any]:
    """Machine, versions, commit and load: without them a figure is not one."""
    from dlms_engine.engine import cpu_loop

    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "isa": cpu_loop.cpu_isa(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dlms_engine": __version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str | None:
    """The commit of this checkout; ``DLMS_COMMIT`` says it where there is none."""
    if given := os.environ.get("DLMS_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout, or nothing committed
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What a figure of a GPU must be quoted with."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "commit": commit(),
        "python": platform.python_version(),
        "backends": ops.available("cuda"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class TimeIsUp(BaseException):
    """The seconds of a benchmark are over; no ``except Exception`` on the way holds that up."""


def measure_within(
    seconds: float | None, cases: Sequence[_Case], measure: Callable[[_Case], object]
) -> list[_Case]:
    """Measures the cases in order for at most ``seconds`` in all, None for as long as it takes.

    The alarm ends a case wherever it is, so this has to run in the main thread.

    Returns:
        the cases there was no time for, the one that was ended first.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"--seconds is {seconds}, expected a number above 0")

    def ring(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    done = 0
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
        for case in cases:
            measure(case)
            done += 1
    except TimeIsUp:
        return list(cases[done:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return []


def say_not_measured(report: dict[str, Any], cases: Sequence[Any], options: Any) -> None:
    """Notes in the report, and prints, what there was no time for."""
    report["not_measured"] = list(cases)
    if not options.json:
        for case in cases:
            print(f"not measured, the time is over: {case}")


def json_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--output`` and ``--seconds``, which every benchmark has."""
    parser.add_argument(
        "--seconds", type=float, help="end after these; the report names what was not measured"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=_writable, help="also write the JSON to this file")


def _writable(text: str) -> Path:
    """The path, tried before anything is measured."""
    try:
        require_writable(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def save_report(report: dict[str, Any], options: argparse.Namespace) -> str:
    """Writes the report where ``--output`` says; returns its JSON."""
    text = json.dumps(report, indent=2)
    if options.output:
        write_text(options.output, text + "\n")
    return text


def finish_report(report: dict[str, Any], options: argparse.Namespace) -> bool:
    """Writes the report where ``--output`` says; prints it and is True with ``--json``."""
    text = save_report(report, options)
    if options.json:
        print(text)
    return bool(options.json)

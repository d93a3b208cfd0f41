"""Cost of one solver step outside the network: the engine against diffusers' schedulers.

The engine's step forms m, the next state and the next network input of a two-step multistep solver
(depth 2: DPM-Solver++(2M), UniPC-1, iPNDM-2) with float32 state and history. diffusers' step gets
the same network output and forms the next state, with its state in the network's dtype. `copy` is
`dst.copy_(src)` of one latent: its bytes per second are the limit of the machine.

`--device cuda` measures on a GPU: `bench/step_cuda.py`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlms_engine import ops
from dlms_engine.engine import cpu_loop
from dlms_engine.ops import layout

from . import device, rivals, step_cuda, timing

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128), (64, 3, 32, 32))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEPTH = 2
LOOP_ROWS = 20
ROUNDS = 9


def bench_step(arguments: list[str] | None = None) -> int:
    """Measures, prints a table, and with --json the figures; returns the exit status."""
    options = _parse(arguments)
    if options.device == "cuda":
        return 2 if device.no_gpu("dlms bench step") else step_cuda.bench_step_cuda(options)
    torch.set_num_threads(options.threads)
    cases: list[dict[str, Any]] = []

    def measure(case: tuple[tuple[int, ...], str]) -> None:
        cases.append(_measure(*case, options.rounds or ROUNDS, options.round_seconds))
        if not options.json:
            _print_case(cases[-1])

    chosen = list(itertools.product(SHAPES[: 1 if options.quick else None], _DTYPES))
    with torch.inference_mode():
        left = timing.measure_within(options.seconds, chosen, measure)
    report: dict[str, Any] = {
        "benchmark": "step",
        "conditions": {**timing.conditions(), "diffusers": rivals.version()},
        "unit": "microseconds per step, lowest of the round medians",
        "cases": cases,
    }
    timing.say_not_measured(report, left, options)
    if not timing.finish_report(report, options):
        print("\n" + ", ".join(f"{k} {v}" for k, v in report["conditions"].items()))
    return int(not cases)


def _measure(shape: tuple[int, ...], dtype: str, rounds: int, seconds: float) -> dict[str, Any]:
    """All candidates on one shape and network dtype."""
    f = torch.randn(shape).to(_DTYPES[dtype])
    x = torch.randn(shape)
    candidates = _engine_calls(x, f)
    target = torch.empty_like(x)
    candidates["copy"] = lambda: target.copy_(x)
    if rivals.available_rivals():
        for name in rivals.RIVALS:
            candidates[name] = rivals.step_call(name, x, f)
    times = timing.interleaved(candidates, rounds=rounds, seconds=seconds)
    if "loop" in times:  # one call is a whole run
        for key in ("best", "median", "p80"):
            times["loop"][key] /= LOOP_ROWS
    return {
        "shape": list(shape),
        "network_dtype": dtype,
        "microseconds": times,
        **_derived(x, f, {name: t["best"] for name, t in times.items()}),
    }


def _engine_calls(x: Tensor, f: Tensor) -> dict[str, Callable[[], object]]:
    rows = _rows()
    calls: dict[str, Callable[[], object]] = {}
    if cpu_loop.loop_available():
        run = cpu_loop.Engine(x.shape, DEPTH, network_dtype=f.dtype)
        first, row = torch.tensor(1.0), rows[DEPTH]
        run.run(x, rows, lambda n, network_input: f)
        calls["step"] = lambda: run.loop.step(f, None, row)
        calls["loop"] = lambda: run.loop.run(x, first, rows, lambda n, network_input: f)
    state, ring = x.clone(), torch.randn(DEPTH, *x.shape)
    network_input, op_row = torch.empty_like(f), rows[DEPTH]
    operator = torch.ops.dlms.fused_row_.default
    if "cpu" in ops.available():
        calls["op"] = lambda: operator(f, None, state, ring, op_row, network_input)
    eager = ops.select("eager")
    calls["eager"] = lambda: eager(f, None, state, ring, op_row, network_input)
    return calls


def _rows() -> Tensor:
    """Rows whose states stay of order one however often they are run."""
    one = torch.ones(LOOP_ROWS, dtype=torch.float64)
    b = torch.tensor([0.3, 0.2], dtype=torch.float64).expand(LOOP_ROWS, DEPTH).clone()
    b[0, 1] = 0.0
    return layout.pack_rows(0.1 * one, 0.9 * one, 0.5 * one, one, 1.0, b, dtype=torch.float32)


def _derived(x: Tensor, f: Tensor, best: dict[str, float]) -> dict[str, Any]:
    """Speed-ups and bytes per second: a step reads f, x, a slot and writes m, x, the input."""
    ours = best.get("step", best.get("op", best["eager"]))
    moved = x.numel() * (3 + DEPTH - 1) * x.element_size() + 2 * f.numel() * f.element_size()
    copied = 2 * x.numel() * x.element_size()
    return {
        "speedup": {name: best[name] / ours for name in rivals.RIVALS if name in best},
        "gigabytes_per_second": moved / ours / 1e3,
        "fraction_of_copy": (moved / ours) / (copied / best["copy"]),
    }


def _print_case(case: dict[str, Any]) -> None:
    shape = "x".join(str(size) for size in case["shape"])
    print(f"\n{shape} network {case['network_dtype']}: microseconds per step")
    print(f"  {'':10}{'best':>10}{'median':>10}{'p80':>10}{'speed-up':>10}")
    for name, t in case["microseconds"].items():
        gain = f"{case['speedup'][name]:9.1f}x" if name in case["speedup"] else ""
        print(f"  {name:10}{t['best']:10.2f}{t['median']:10.2f}{t['p80']:10.2f}{gain:>10}")
    rate, share = case["gigabytes_per_second"], case["fraction_of_copy"]
    print(f"  step moves {rate:.0f} GB/s, {share:.2f} of copy_", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dlms bench step", description=__doc__)
    timing.json_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"interleaved rounds; default {ROUNDS}, on a GPU {step_cuda.ROUNDS}",
    )
    parser.add_argument(
        "--round-seconds", type=float, default=0.02, help="per candidate and round, on the CPU"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    parser.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="on a GPU: leave out torch.compile of diffusers' steps",
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    return options


if __name__ == "__main__":
    sys.exit(bench_step())

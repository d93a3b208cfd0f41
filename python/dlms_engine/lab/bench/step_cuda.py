"""``dlms bench step --device cuda``: one solver step on a GPU, every way there is, side by side.

For DPM-Solver++(2M) and UniPC-2: diffusers' `step`, eager and under torch.compile, and the engine's
row of the same solver, launched by Triton and by CUDA and as a node of a captured graph. What the
ways compute is compared before anything is timed. A way that cannot be had is in the report with
the reason.

Bytes are those the engine's row has to move (`device.row_bytes`) for every way, so that bytes per
second say how fast the step's work is done, whatever a way moves on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlms_engine import ops
from dlms_engine.ops import layout

from . import device, rivals, timing
from .step_report import (
    COMPILED,
    EAGER,
    IN_GRAPH,
    TIMED_SOLVERS,
    print_case,
    ratios,
)

_CASES = (
    ((1, 4, 64, 64), "float32"),
    ((64, 3, 256, 256), "float32"),
    ((16, 16, 128, 128), "bfloat16"),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS, NODES, SETS = 20, 200, 1024
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest difference of two ways, relative to the largest entry, that is rounding."""

_Run = Callable[[int], object]


@dataclass(frozen=True)
class Tools:
    """What needs a GPU; tests put others in their place."""

    cache_bytes: int
    place: str = "cuda"
    backends: tuple[str, ...] = ("cuda", "triton")
    compiler: str | None = "inductor"  # None: the steps of diffusers are not compiled
    timer: Callable[[Sequence[_Run], int], list[list[float]]] = device.interleaved_events
    capture: Callable[[list[device.Problem], ops.Backend, int], _Run] = device.capture_rows
    bandwidth: Callable[[], float] = device.copy_bandwidth


class Absent(Exception):
    """A way that cannot be had; the message is the reason."""


@dataclass(frozen=True)
class Way:
    """One way to take the step of a solver. A call takes `steps` of them."""

    solver: str
    name: str
    run: _Run
    nbytes: int
    steps: int = 1
    stepper: rivals.Stepper | None = None  # of a compiled way: it counts its graphs


@dataclass
class Case:
    """One shape and network dtype, and what is collected about it."""

    shape: tuple[int, ...]
    dtype: str
    tools: Tools
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        self.ways: list[Way] = []
        self.absent: list[dict[str, str]] = []

    def measure(self) -> dict[str, Any]:
        """Every available way: a dict for JSON.

        Raises:
            RuntimeError: a kernel of the engine does not give the reference's bits.
        """
        self.ways, self.absent = [], []
        rivals.forget_compiled()
        bandwidth = self.tools.bandwidth()
        with torch.no_grad():
            for solver in TIMED_SOLVERS:
                self._engine(solver)
                self._rivals(solver)
            before = [way.stepper.graphs if way.stepper else 0 for way in self.ways]
            times = self.tools.timer([way.run for way in self.ways], self.rounds)
        rows = [_row(w, t, bandwidth) for w, t in zip(self.ways, times, strict=True)]
        for way, row, graphs in zip(self.ways, rows, before, strict=True):
            if way.stepper is not None and way.stepper.graphs != graphs:
                self._miss(way.solver, way.name, "torch.compile compiled again while it was timed")
                row["valid"] = False
        rows = [row for row in rows if row.pop("valid")]
        ratios(rows)
        return {
            "shape": list(self.shape),
            "network_dtype": self.dtype,
            "copy_bytes_per_s": bandwidth,
            "rows": rows,
            "absent": self.absent,
        }

    def _miss(self, solver: str, way: str, reason: str) -> None:
        self.absent.append({"solver": solver, "way": way, "reason": reason})

    def _sets(self, nbytes: int) -> int:
        return device.buffers_needed(nbytes, self.tools.cache_bytes, SETS)

    def _nbytes(self, solver: str) -> int:
        weights = rivals.rows(solver)[rivals.AT][layout.B :]
        history = int(weights.count_nonzero()) - 1
        return device.row_bytes(self.shape, _DTYPES[self.dtype].itemsize, history)

    # -- the engine's ways ------------------------------------------------------------------------

    def _engine(self, solver: str) -> None:
        nbytes = self._nbytes(solver)
        depth = layout.depth_of(rivals.rows(solver).shape[1])
        make = device.Problem.make
        problems = [
            make(self.shape, _DTYPES[self.dtype], depth, self.tools.place)
            for _ in range(self._sets(nbytes))
        ]
        for name in self.tools.backends:
            try:
                backend = ops.select(name, self.tools.place)
            except ops.BackendUnavailable as error:
                for way in (name, f"{name} {IN_GRAPH}"):
                    self._miss(solver, way, str(error))
                continue
            device.check_device(backend, problems[0])

            def launch(i: int, backend: ops.Backend = backend) -> None:
                problems[i % len(problems)].step(backend)

            nodes = max(NODES, len(problems))
            captured = self.tools.capture(problems, backend, nodes)
            self.ways.append(Way(solver, name, launch, nbytes))
            self.ways.append(Way(solver, f"{name} {IN_GRAPH}", captured, nbytes, nodes))

    # -- diffusers' -------------------------------------------------------------------------------

    def _rivals(self, solver: str) -> None:
        reason = rivals.absence()
        if reason is not None:
            self._miss(solver, EAGER, reason)
            self._miss(solver, COMPILED, reason)
            return
        try:
            eager = self._eager(solver)
        except Exception as error:  # another version's step: whatever it raises is the reason
            self._miss(solver, EAGER, _reason(error))
            self._miss(solver, COMPILED, "there is no eager step to compile")
            return
        nbytes = self._nbytes(solver)
        self.ways.append(Way(solver, EAGER, eager, nbytes))
        try:
            compiled = self._compiled(eager)
        except Exception as error:  # a compiler's failure has no common type
            self._miss(solver, COMPILED, _reason(error))
            return
        self.ways.append(Way(solver, COMPILED, compiled, nbytes, stepper=compiled))

    def _eager(self, solver: str) -> rivals.Stepper:
        x = torch.randn(self.shape, device=self.tools.place)
        f = torch.randn(self.shape, device=self.tools.place)
        small = (x[:1], f[:1])
        off = rivals.disagreement(solver, *small, rivals.rows(solver))
        if not off <= AGREE["float32"]:
            raise Absent(f"its step differs from the engine's by {off:.1e} of the largest entry")
        f = f.to(_DTYPES[self.dtype])
        per_set = 4 * f.nbytes  # network output, state and two kept outputs
        return rivals.Stepper(solver, x, f, self._sets(per_set))

    def _compiled(self, eager: rivals.Stepper) -> rivals.Stepper:
        if self.tools.compiler is None:
            raise Absent("--no-compile was given")
        compiled = eager.compiled(self.tools.compiler)
        want = eager(0)
        for i in (0, 1, 0):  # the first calls compile; what follows must not
            got = compiled(i)
        off = float((got.double() - want.double()).abs().max() / want.double().abs().max())
        if not off <= AGREE[self.dtype]:
            raise Absent(f"compiled it differs from itself by {off:.1e} of the largest entry")
        if not compiled.graphs:
            raise Absent("torch.compile traced no graph of it")
        return compiled


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Absent) else rivals.first_line(error)


def _row(way: Way, times: Sequence[float], bandwidth: float) -> dict[str, Any]:
    p20, p50, p80 = (t / way.steps for t in device.quantiles(times))
    rate = way.nbytes / (1e-6 * p50)
    row = {
        "solver": way.solver,
        "way": way.name,
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        "bytes": way.nbytes,
        "bytes_per_s": rate,
        "fraction_of_copy": rate / bandwidth,
        "valid": True,
    }
    return row if way.stepper is None else {**row, "graphs": way.stepper.graphs}


def bench_step_cuda(options: argparse.Namespace) -> int:
    """`options` as `bench.step` parses them; the GPU is there."""
    properties = torch.cuda.get_device_properties(0)
    tools = Tools(
        cache_bytes=properties.L2_cache_size, compiler="inductor" if options.compile else None
    )
    return run(tools, options, timing.machine())


def run(tools: Tools, options: argparse.Namespace, machine: dict[str, Any]) -> int:
    """Measures, prints and writes; after each case the JSON holds what there is so far."""
    torch.manual_seed(0)
    found = list[dict[str, Any]]()
    chosen = _CASES[:1] if options.quick else _CASES
    report: dict[str, Any] = {
        "benchmark": "step",
        "device": tools.place,
        "machine": machine,
        "conditions": {**timing.conditions(), "diffusers": rivals.version()},
        "unit": "microseconds per step",
        "settings": {"rounds": options.rounds or ROUNDS, "compiler": tools.compiler},
        "cases": found,
    }

    def measure(case: tuple[tuple[int, ...], str]) -> None:
        found.append(Case(*case, tools, options.rounds or ROUNDS).measure())
        report["complete"] = len(found) == len(chosen)
        timing.save_report(report, options)
        if not options.json:
            print_case(found[-1])

    timing.say_not_measured(
        report, timing.measure_within(options.seconds, chosen, measure), options
    )
    if not timing.finish_report(report, options):
        print("\n" + ", ".join(f"{k} {v}" for k, v in machine.items()))
    return 0

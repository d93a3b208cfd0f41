"""`dlms bench step --device cuda` without a GPU: everything but the clock, on CPU tensors."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dlms_engine import ops
from dlms_engine.lab.bench import device, rivals, step, step_cuda, step_report, timing

needs_diffusers = pytest.mark.skipif(
    not rivals.available_rivals(), reason="diffusers is not installed"
)
PRICES = {"eager": 100.0, "compile": 40.0, "launch": 5.0, "graph": 1.5}
MACHINE = {"gpu": "NVIDIA H200", "driver": "1"}
COPY = 4e12


class Clock:
    """A timer that runs every way and charges a fixed price, so that all statistics are known."""

    def __init__(self, calls: int = 3) -> None:
        self.calls = calls
        self.runs: list[Callable[[int], object]] = []

    def __call__(self, runs: Sequence[Callable[[int], object]], rounds: int) -> list[list[float]]:
        self.runs = list(runs)
        times = []
        for run in runs:
            for i in range(self.calls):
                run(i)
            if isinstance(run, rivals.Stepper):
                price = PRICES["compile" if run.graphs else "eager"]
            else:
                price = PRICES["launch"] if not hasattr(run, "nodes") else run.nodes * 1.5
            times.append([price * (1 + 0.1 * i) for i in range(rounds)])
        return times


class Replay:
    """Stands for a captured graph."""

    def __init__(self, problems: list[device.Problem], backend: ops.Backend, nodes: int) -> None:
        self.problems, self.backend, self.nodes = problems, backend, nodes

    def __call__(self, i: int) -> None:
        self.problems[i % len(self.problems)].step(self.backend)


def tools(**changes: Any) -> step_cuda.Tools:
    held: dict[str, Any] = {
        "cache_bytes": 1 << 10,
        "place": "cpu",
        "backends": ("cpu",) if "cpu" in ops.available("cpu") else ("eager",),
        "compiler": "eager",
        "timer": Clock(),
        "capture": Replay,
        "bandwidth": lambda: COPY,
    }
    return step_cuda.Tools(**{**held, **changes})


def case(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    return step_cuda.Case((1, 4, 8, 8), dtype, tools(**changes), 3).measure()


def ways(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["solver"], row["way"]): row for row in found["rows"]}


@needs_diffusers
@pytest.mark.parametrize("name", step_report.TIMED_SOLVERS)
def test_both_take_the_same_step(name: str) -> None:
    """The engine's rows give diffusers' state; those of the other solver do not."""
    torch.manual_seed(0)
    x, f = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert rivals.disagreement(name, x, f, rivals.rows(name)) < 2e-6
    other = next(n for n in step_report.TIMED_SOLVERS if n != name)
    assert rivals.disagreement(name, x, f, rivals.rows(other)) > 10 * step_cuda.AGREE["float32"]


@needs_diffusers
@pytest.mark.parametrize("name", step_report.TIMED_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sets_and_compiled_steps_are_the_same_step(name: str, dtype: torch.dtype) -> None:
    rivals.forget_compiled()
    stepper = rivals.Stepper(name, torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8).to(dtype), 3)
    want = stepper(0)
    compiled = stepper.compiled("eager")
    assert stepper.graphs == 0
    for i in range(7):
        assert torch.equal(stepper(i), want)
        assert torch.equal(compiled(i), want)
    assert compiled.graphs >= 1
    stepper._sets[1].f.add_(1)
    assert not torch.equal(stepper(1), want)
    assert torch.equal(stepper(3), want)  # sets have buffers of their own


@needs_diffusers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_both_solvers(dtype: str) -> None:
    found = case(dtype)
    backend = tools().backends[0]
    expected = {backend, f"{backend} in graph", step_report.EAGER, step_report.COMPILED}
    assert found["absent"] == []
    rows = ways(found)
    assert set(rows) == {(solver, way) for solver in step_report.TIMED_SOLVERS for way in expected}
    for (solver, way), row in rows.items():
        network = 2 if dtype == "bfloat16" else 4
        history = 1 if solver == "DPM++2M" else 2
        assert row["bytes"] == 256 * (4 * (3 + history) + 2 * network)
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["bytes_per_s"] == pytest.approx(row["bytes"] / (1e-6 * row["p50_us"]))
        assert row["fraction_of_copy"] == pytest.approx(row["bytes_per_s"] / COPY)
        ours = rows[solver, f"{backend} in graph"]
        assert row["times_in_graph"] == pytest.approx(row["p50_us"] / ours["p50_us"])
        if way.endswith("in graph"):
            assert row["p50_us"] == pytest.approx(1.1 * PRICES["graph"])  # of a step, not a replay
    assert rows["DPM++2M", step_report.EAGER]["p50_us"] == pytest.approx(1.1 * PRICES["eager"])
    assert rows["DPM++2M", step_report.COMPILED]["graphs"] >= 1


def test_buffers_rotate_through_more_than_the_cache() -> None:
    clock = Clock()
    case(timer=clock, cache_bytes=1 << 16)
    replay = next(run for run in clock.runs if isinstance(run, Replay))
    nbytes = device.row_bytes((1, 4, 8, 8), 4, 1)
    assert len(replay.problems) * nbytes >= 3 << 16
    assert replay.nodes >= max(step_cuda.NODES, len(replay.problems))


def test_rivals_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = case()
    assert {row["way"].split()[0] for row in found["rows"]} == {tools().backends[0]}
    assert len(found["absent"]) == 4
    assert all("pip install diffusers" in a["reason"] for a in found["absent"])
    assert all("diffusers cannot be imported" in a["reason"] for a in found["absent"])


def test_a_backend_that_is_not_there_is_told() -> None:
    found = case(backends=("cuda", *tools().backends), compiler=None)
    gone = [a for a in found["absent"] if a["way"].startswith("cuda")]
    assert {a["way"] for a in gone} == {"cuda", "cuda in graph"} and len(gone) == 4
    assert all("backend 'cuda'" in a["reason"] for a in gone)


@needs_diffusers
def test_compilation_that_fails_or_is_left_out_is_told() -> None:
    for compiler, reason in ((None, "--no-compile"), ("no-such-compiler", "no-such-compiler")):
        found = case(compiler=compiler)
        assert [a["way"] for a in found["absent"]] == [step_report.COMPILED] * 2
        assert all(reason in a["reason"] for a in found["absent"])
        assert ("DPM++2M", step_report.EAGER) in ways(found)


@needs_diffusers
def test_a_rival_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = {**rivals.RIVALS, "DPM++2M": rivals.RIVALS["DPM++3M"]}
    monkeypatch.setattr(rivals, "RIVALS", swapped)
    found = case()
    reason = next(a["reason"] for a in found["absent"] if a["way"] == step_report.EAGER)
    assert "differs from the engine's" in reason
    assert {s for s, w in ways(found) if w == step_report.EAGER} == {"UniPC-2"}


@needs_diffusers
def test_a_rival_compiled_again_while_it_is_timed_is_not_reported() -> None:
    """torch.compile inside the timed calls would charge the rival for compiling."""

    class Forgetful(Clock):
        def __call__(self, runs: Any, rounds: int) -> list[list[float]]:
            rivals.forget_compiled()
            return super().__call__(runs, rounds)

    found = case(timer=Forgetful())
    assert {a["reason"] for a in found["absent"]} == {
        "torch.compile compiled again while it was timed"
    }
    assert not any(row["way"] == step_report.COMPILED for row in found["rows"])


def test_a_kernel_with_other_bits_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = tools().backends[0]
    backend = ops.select(name)
    wrong = lambda *a: tuple(t + 1 for t in backend.fused_row(*a))  # noqa: E731
    broken = ops.Backend(name, (), 0, wrong, backend.fused_row_, backend.fused_row_backward)
    monkeypatch.setattr(step_cuda.ops, "select", lambda *a: broken)
    with pytest.raises(RuntimeError, match="differs from eager"):
        case(compiler=None)


def options(*words: str) -> argparse.Namespace:
    return step._parse(["--device", "cuda", *words])


def test_report_grows_case_by_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that is taken away leaves what was measured."""
    shapes = ((1, 4, 8, 8), "float32"), ((1, 4, 4, 4), "bfloat16")
    monkeypatch.setattr(step_cuda, "_CASES", shapes)
    path = tmp_path / "step.json"
    seen = []

    class Watching(Clock):
        def __call__(self, runs: Any, rounds: int) -> list[list[float]]:
            seen.append(json.loads(path.read_text()) if path.exists() else None)
            return super().__call__(runs, rounds)

    given = tools(timer=Watching(), compiler=None)
    assert step_cuda.run(given, options("--rounds", "2", "--output", str(path)), MACHINE) == 0
    text = capsys.readouterr().out
    assert "absent: --no-compile was given" in text or not rivals.available_rivals()
    assert "driver 1" in text
    assert seen[0] is None and len(seen[1]["cases"]) == 1 and not seen[1]["complete"]
    report = json.loads(path.read_text())
    assert report["complete"] and len(report["cases"]) == 2
    assert report["machine"] == MACHINE and report["settings"]["rounds"] == 2
    assert step_cuda.run(given, options("--quick", "--json"), MACHINE) == 0
    assert len(json.loads(capsys.readouterr().out)["cases"]) == 1


def test_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert step._parse([]).device == "cpu" and options("--no-compile").compile is False
    with pytest.raises(SystemExit):
        options("--rounds", "0")
    assert "--rounds is 0, expected at least 1" in capsys.readouterr().err
    called = []
    monkeypatch.setattr(step.step_cuda, "bench_step_cuda", lambda given: called.append(given) or 0)
    monkeypatch.setattr(step.device, "no_gpu", lambda program: True)
    assert step.bench_step(["--device", "cuda"]) == 2 and not called
    monkeypatch.setattr(step.device, "no_gpu", lambda program: False)
    assert step.bench_step(["--device", "cuda"]) == 0 and called[0].device == "cuda"


class FakeEvents:
    """CUDA's clock without CUDA: every call of a run moves it by that run's price."""

    def __init__(self, prices: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        self.runs = [self._run(k, price) for k, price in enumerate(prices)]

    def _run(self, k: int, price: float) -> Callable[[int], object]:
        def run(i: int) -> None:
            self.now += price
            self.calls.append((k, i))

        return run


def test_rounds_on_a_gpu_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEvents([0.25, 8.0], monkeypatch)  # milliseconds
    times = device.interleaved_events(fake.runs, 4, milliseconds=3.0)
    assert times == [[pytest.approx(250.0)] * 4, [pytest.approx(8000.0)] * 4]
    timed = fake.calls[-4 * (12 + 3) :]  # a round: 3 ms of the first, at least three of the second
    assert [k for k, _ in timed] == ([0] * 12 + [1] * 3) * 4
    for k, many in ((0, 48), (1, 12)):  # every call has the next buffers
        assert [i for which, i in timed if which == k] == list(range(many))


def test_a_figure_comes_with_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setenv("DLMS_COMMIT", "1234567-dirty")
    found = timing.machine()
    assert found["gpu"] == "NVIDIA H200" and found["commit"] == "1234567-dirty"
    assert {"driver", "torch", "cuda", "triton", "python"} <= set(found)
    assert (found["diffusers"] is not None) or not rivals.available_rivals()
    assert timing._version("no-such-package") is None


def test_a_row_is_timed_cold_and_warm_and_with_both_ways_to_read_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits, timed = [123], []

    def early_slots_limit(elements: int) -> int:
        limits.append(elements)
        return limits[-2]

    def graph_times(problems: list[device.Problem], backend: ops.Backend, nodes: int):
        timed.append((len(problems), nodes, limits[-1]))
        return [2.0, 4.0]

    make = device.Problem.make
    monkeypatch.setattr(device.Problem, "make", lambda *a: make(*a[:3], "cpu"))
    monkeypatch.setattr(device.libraries, "early_slots_limit", early_slots_limit)
    monkeypatch.setattr(device, "graph_times", graph_times)
    monkeypatch.setattr(device, "time_each", lambda run: [6.0 + 0 * bool(run(0))])
    monkeypatch.setattr(device.ops, "available", lambda kind: ("cuda", "triton", "eager"))
    eager = ops.select("eager")
    monkeypatch.setattr(device.ops, "select", lambda *name: eager)
    properties = type("Properties", (), {"L2_cache_size": 1 << 16})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = device.measure((1, 4, 8, 8), torch.float32, 3, 1e12)
    labels = ["cuda in a graph" + slots for slots in ("", ", early", ", late")]
    labels = [*labels, "triton in a graph"]
    labels = [label + warm for label in labels for warm in ("", ", warm")]
    assert [r.name for r in found] == [*labels[:6], "cuda", *labels[6:], "triton", "eager"]
    assert {sets for sets, _, _ in timed} == {1, 28} and {nodes for _, nodes, _ in timed} == {200}
    assert [limit for *_, limit in timed] == [123, 123, 1 << 62, 1 << 62, 0, 0, 123, 123]
    assert found[0].bytes == 7168 and found[0].fraction_of_copy == pytest.approx(7168 / 3e-6 / 1e12)


def test_the_time_ends_the_shape_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "row.json"
    timed = device.Timing("cuda", (1, 4), "float32", 3, 1.0, 2.0, 3.0, 64, 0.5)
    written: list[int] = []

    def measure(*args: object) -> list[device.Timing]:
        written.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if len(written) == 3:
            time.sleep(30)
        return [timed]

    monkeypatch.setattr(device, "no_gpu", lambda program: False)
    monkeypatch.setattr(device, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(device, "measure", measure)
    monkeypatch.setattr(device, "machine", lambda: {"gpu": "none"})
    assert device.bench_device(["--seconds", "0.5", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert written == [0, 1, 2] and len(report["rows"]) == 2  # each shape is on disk at once
    assert report["not_measured"][1] == [[64, 3, 32, 32], "float32"]
    assert "not measured, the time is over" in capsys.readouterr().out


def test_the_limit_of_early_slots_is_refused_without_the_library() -> None:
    with pytest.raises(ValueError, match="-1"):
        device.libraries.early_slots_limit(-1)
    if "cuda" not in ops.available():
        with pytest.raises(ops.BackendUnavailable, match="cuda"):
            device.libraries.early_slots_limit()
        return
    before = device.libraries.early_slots_limit(7)
    assert device.libraries.early_slots_limit(before) == 7
    assert device.libraries.early_slots_limit() == before


@pytest.mark.needs_cuda
def test_on_a_gpu() -> None:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    given = step_cuda.Tools(cache_bytes=cache, compiler=None)
    found = step_cuda.Case((1, 4, 64, 64), "float32", given, 3).measure()
    assert {"triton", "triton in graph"} <= {way for _, way in ways(found)}
    assert all(0 < r["p20_us"] <= r["p50_us"] <= r["p80_us"] for r in found["rows"])
    assert any(r["times_in_graph"] for r in found["rows"])

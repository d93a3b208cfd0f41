"""`dlms bench loop` without a GPU: statistics, figures to reach and what is absent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dlms_engine.lab.bench import loop, rivals

SETTINGS = {"network": "embedded", "batch": 1, "nfe": 5, "device": "cuda"}
PRICES = [9.0, 3.0, 2.0]  # eager loop, engine, bare network


def fixed_walls(
    runs: Sequence[Callable[[], object]], device: str, repeats: int
) -> list[list[float]]:
    for run in runs:
        run()
    return [[price * (1 + i) for i in range(repeats)] for price in PRICES]


def fixed_events(runs: Sequence[Callable[[int], object]], repeats: int) -> list[list[float]]:
    for run in runs:
        run(0)
    return [[1e3 * price / 2] * repeats for price in PRICES]


CLOCKS = loop.Clocks(fixed_walls, fixed_events)


def arguments(**changes: Any) -> argparse.Namespace:
    held = {"network": "plain", "device": "cpu", "batch": 2, "nfe": 3, "repeats": 3}
    return argparse.Namespace(**{"seconds": None, "json": True, **held, **changes})


def test_both_clocks_are_summed_up() -> None:
    found = loop.report(arguments(), CLOCKS)
    assert found["captured"] is None
    assert found["milliseconds"]["engine"] == [3.0, 6.0, 9.0]
    one_run, steady = (found["summary"][key] for key in ("milliseconds", "back_to_back"))
    assert one_run["engine"] == {"p20": 3.0, "p50": 6.0, "p80": 9.0}
    assert one_run["times_faster_than_eager"] == pytest.approx(3.0)
    assert one_run["overhead"] == pytest.approx(0.5)
    assert steady["bare network"]["p50"] == pytest.approx(1.0)  # milliseconds from microseconds


def test_a_cpu_has_one_clock(capsys: pytest.CaptureFixture[str]) -> None:
    found = loop.report(arguments(), loop.Clocks(fixed_walls, None))
    assert found["back_to_back"] is None and set(found["summary"]) == {"milliseconds"}
    assert loop.Clocks.on("cpu").events is None and loop.Clocks.on("cuda").events is not None
    loop.show(found)
    text = capsys.readouterr().out
    assert "one run, plain" in text and "3.00 times" in text and "50.0 % above" in text
    assert "back to back" not in text


def test_rounds_are_interleaved() -> None:
    order: list[int] = []
    runs = [lambda k=k: order.append(k) for k in range(3)]
    times = loop.interleaved_walls(runs, "cpu", 2)
    assert [len(each) for each in times] == [2, 2, 2]
    assert order[-6:] == [0, 1, 2, 0, 1, 2]


def test_without_diffusers_the_plain_network_runs_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert rivals.absence() is not None
    found = loop.report(arguments(network="auto"), CLOCKS)
    assert found["settings"]["network"] == "plain"
    assert found["absent"][0]["what"] == "embedded model"
    loop.show(found)
    assert "embedded model absent: diffusers cannot be imported" in capsys.readouterr().out
    with pytest.raises(ImportError, match="pip install"):
        loop.report(arguments(network="embedded"), CLOCKS)


def test_report_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = dict(zip(loop.WAYS, ([30.0], [10.0], [9.9]), strict=True))
    found = {"captured": True, "milliseconds": times, "back_to_back": times}
    monkeypatch.setattr(loop, "_measure", lambda *given: found)
    monkeypatch.setattr(loop, "machine", lambda: {"gpu": "NVIDIA H200"})
    monkeypatch.setattr(loop.rivals, "absence", lambda: None)
    result = loop.report(arguments(network="auto", device="cuda", batch=1, nfe=5))
    assert result["machine"]["gpu"] == "NVIDIA H200"
    loop.show(result)
    text = capsys.readouterr().out
    assert "back to back, embedded network" in text


def test_a_sample_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(loop.Sampler):
        def forward(self, noise: Any, **options: Any) -> Any:
            return super().forward(noise, **options) + (self.backend == "auto") * 1e3

    monkeypatch.setattr(loop, "Sampler", Off)
    with pytest.raises(RuntimeError, match="differs from the eager one"):
        loop.report(arguments(), CLOCKS)


def test_bad_repeats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loop.bench_loop(["--repeats", "0"])
    assert "--repeats is 0" in capsys.readouterr().err

"""The benchmarks print one JSON object with ``--json`` and write it with ``--output``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlms_engine.lab.bench import __main__ as bench
from dlms_engine.lab.bench import device, timing

QUICK = {
    "step": ["--quick", "--rounds", "1", "--round-seconds", "0.001"],
    "loop": ["--network", "plain", "--repeats", "2", "--nfe", "2"],
    "device": [],
    "pipeline": ["--no-compile", "--batches", "1", "--repeats", "1", "--nfe", "2"],
    "allocator": ["--batches", "1", "--rounds", "1", "--calls", "1"],
}


@pytest.fixture(autouse=True)
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a GPU is replaced by a figure."""
    timing = device.Timing("cuda", (1, 4), "float32", 3, 1.0, 2.0, 3.0, 64, 0.5)
    monkeypatch.setattr(device, "no_gpu", lambda program: False)
    monkeypatch.setattr(device, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(device, "measure", lambda *args: [timing])
    monkeypatch.setattr(device, "machine", lambda: {"gpu": "none"})


@pytest.mark.parametrize("what", QUICK)
def test_json_is_a_flag_and_output_a_file(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    threads = torch.get_num_threads()
    assert bench.main_bench([what, *QUICK[what], "--json", "--output", str(path)]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text(encoding="utf-8"))
    assert printed["benchmark"] == what
    assert bench.main_bench([what, *QUICK[what]]) == 0
    table = capsys.readouterr().out
    with pytest.raises(json.JSONDecodeError):
        json.loads(table)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("what", [*QUICK, "distill"])
def test_a_file_that_cannot_be_written_is_found_before_the_work(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of minutes were lost where the folder of ``--output`` was not there."""
    path = tmp_path / "absent" / "out.json"
    with pytest.raises(SystemExit) as stop:
        bench.main_bench([what, *QUICK.get(what, []), "--output", str(path)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert "create the folder or choose another output" in captured.err


def test_each_module_is_one_of_them() -> None:
    assert {what.value for what in bench.What} == {*QUICK, "distill"}
    assert bench.main_bench(["magic"]) == 2


@pytest.mark.parametrize("what", ["step", "loop", "pipeline"])
def test_a_benchmark_ends_within_its_seconds(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--seconds`` meant something else in every benchmark, and none ended by it."""
    from dlms_engine.lab.bench import loop, pipeline, step

    def endless(*_: object) -> None:
        try:
            time.sleep(60)
        except Exception:  # what a learner may do about a failure is not to hold the alarm up
            time.sleep(60)

    for module in (step, loop, pipeline):
        monkeypatch.setattr(module, "_measure", endless)
    path, start, threads = tmp_path / "out.json", time.monotonic(), torch.get_num_threads()
    words = [what, *QUICK[what], "--seconds", "0.2", "--output", str(path)]
    assert bench.main_bench(words) == 1
    torch.set_num_threads(threads)
    assert time.monotonic() - start < 30
    assert json.loads(path.read_text(encoding="utf-8"))["not_measured"]


def test_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds is -1"):
        timing.measure_within(-1, [1], print)

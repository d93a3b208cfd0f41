"""The measured parts of the performance page come from measurements and from nothing else."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dlms_engine.lab.bench import loop
from dlms_engine.lab.bench.device import Timing
from dlms_engine.lab.bench.step_report import ratios

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
gpu_figures, gpu_page = map(importlib.import_module, ("gpu_figures", "gpu_page"))
MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "python": "3.12.3",
    "commit": "abc1234",
    "packages": {"triton": "3.6.0", "diffusers": None},
}


def step_rows() -> list[dict[str, Any]]:
    rows = [
        {"solver": "DPM++2M", "way": way, "p50_us": us, "fraction_of_copy": 0.5}
        for way, us in (("cuda in graph", 2.0), ("diffusers eager", 300.0))
    ]
    ratios(rows)
    return rows


def result(started: str = "2026-01-02T03:04:05Z", row_us: float = 1.5, **more: Any):
    times = {loop.EAGER: [4.0] * 5, loop.ENGINE: [1.016] * 5, loop.BARE: [1.0] * 5}
    row = Timing("cuda in a graph", (1, 4, 64, 64), "float32", 3, 1.4, row_us, 1.6, 10**5, 0.2)
    checks = [{"check": "a", "status": "passed"}, {"check": "b", "status": "failed"}]
    results = {
        "rows-cuda": {"checks": checks},
        "bench-row": {"rows": [asdict(row)]},
        "bench-loop": {
            "settings": {"network": "embedded", "batch": 1},
            "captured": True,
            "summary": {"milliseconds": loop.loop_summary(times)},
        },
        "bench-step": {
            "cases": [{"shape": [1, 4, 64, 64], "network_dtype": "float32", "rows": step_rows()}]
        },
    }
    stages = [
        {"stage": s, "status": "passed", "seconds": 1, "said": f"{s} said so"}
        for s in ("import", *results)
    ]
    file = {"started": started, "machine": MACHINE, "copy_bytes_per_s": 3e12, "stages": stages}
    return json.loads(json.dumps({**file, "rehearsal": False, "results": results, **more}))


def page() -> str:
    return gpu_page.PAGE.read_text(encoding="utf-8")


def blocks(text: str) -> dict[str, str]:
    return {match[2]: match[3].strip() for match in gpu_page.BLOCK.finditer(text)}


def test_the_page_says_what_was_measured_and_no_more():
    results = sorted((gpu_page.ROOT / "benchmarks" / "results").glob(gpu_page.RESULTS))
    assert gpu_page.filled(page(), [json.loads(p.read_text()) for p in results]) == page()


def test_without_a_measurement_every_part_is_empty():
    text = gpu_page.filled(gpu_page.filled(page(), [result()]), [])
    assert set(blocks(text).values()) == {""}


def test_figures_are_those_measured_with_their_verdicts():
    text = blocks(gpu_page.filled(page(), [result()]))
    row = "| row in a graph, 1x4x64x64 | at most 2 us | 1.5 us | reached |"
    assert row in text["machine"] and "moves 3.00 TB/s" in text["machine"]
    assert "| at least 30 times faster | 150 times faster | reached |" in text["machine"]
    assert "| at most 2 % | 1.6 % | reached |" in text["machine"]
    assert "| at most 30 us | 16 us | reached |" in text["machine"]
    assert "64x3x256x256" not in text["machine"], "what was not measured has no row"
    assert "| rows-cuda | passed | rows-cuda said so | 2026-01-02 |" in text["checks"]
    assert "NVIDIA H100 80GB HBM3, driver 580.1" in text["row"] and "abc1234" in text["row"]


def test_captured_evaluations_stand_beside_plain_ones():
    file, figures = result(), {"trajectories": 3200, "model": "random weights", "score_before": 2.0}
    for name, seconds in (("distil-32", 73.0), ("distil-32-captured", 50.0)):
        more = {"seconds": seconds, "captured": "captured" in name, "score_after": 1.0}
        file["results"][name] = {"checks": [{"check": "a", "figures": {**figures, **more}}]}
    rows = [
        {"model": "unet-32", "method": method, "device": "cuda", "batch": 32, "updates_per_s": 1.0}
        for method in ("dlms", "dlms, captured")
    ]
    rows = [{**row, "unit": "update"} for row in rows]
    file["results"]["bench-distill-captured"] = {"rows": rows}
    for name in ("distil-32", "distil-32-captured", "bench-distill-captured"):
        file["stages"].append({"stage": name, "status": "passed", "seconds": 1, "said": ""})
    text = blocks(gpu_page.filled(page(), [file]))
    assert "random weights: 73.0 s" in text["distil"]
    assert "random weights, captured evaluations: 50.0 s" in text["distil"]
    assert "| unet-32 | dlms, captured | cuda | 32 | 1 | update |" in text["distil"]
    assert "distilled, captured | at most 60 s | 50 s | reached |" in text["machine"]
    assert "distilled | at most 60 s | 73 s | missed |" in text["machine"]


def test_a_missed_figure_is_called_missed():
    text = blocks(gpu_page.filled(page(), [result(row_us=2.5)]))
    assert "| at most 2 us | 2.5 us | missed |" in text["machine"]


def test_the_newest_measurement_of_a_stage_counts():
    older, newer = result("2026-01-01T00:00:00Z", 9.0), result("2026-02-01T00:00:00Z", 1.25)
    newer["results"] = {"bench-row": newer["results"]["bench-row"]}
    newer["stages"] = [s for s in newer["stages"] if s["stage"] in ("import", "bench-row")]
    for files in ([older, newer], [newer, older]):
        text = blocks(gpu_page.filled(page(), files))
        assert "| 1.25 us | reached |" in text["machine"]
        assert "150 times faster" in text["machine"], "the older file's step is still the newest"


def test_a_network_that_is_not_the_embedded_one_has_no_verdict():
    file = result()
    file["results"]["bench-loop"]["settings"]["network"] = "plain"
    reports = file["results"]
    assert gpu_figures.against_loop(reports) is gpu_figures.above_bare(reports) is None


@pytest.mark.parametrize("change", [{"rehearsal": True}, {"machine": {"torch": "2"}}])
def test_a_rehearsal_is_no_measurement(change):
    with pytest.raises(ValueError, match="not measured on a GPU"):
        gpu_page.filled(page(), [result(**change)])


def test_a_page_without_a_mark_is_refused():
    with pytest.raises(ValueError, match="each of"):
        gpu_page.filled(page().replace("<!-- measured: row -->", ""), [])


def test_the_command_line(tmp_path, capsys):
    copy: Path = tmp_path / "page.md"
    shutil.copy(gpu_page.PAGE, copy)
    (tmp_path / "gpu-x.json").write_text(json.dumps(result(row_us=1.75)))
    arguments = [str(copy), str(tmp_path / "gpu-x.json")]
    assert gpu_page.make_page(["--check", *arguments]) == 1 and "stale" in capsys.readouterr().out
    assert gpu_page.make_page(arguments) == 0 == gpu_page.make_page(["--check", *arguments])
    assert re.search(r"\| 1\.75 us \| reached \|", copy.read_text())

"""``sample`` and ``evaluate`` under torchrun: the same bits for any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = ("--model", "cli_model:tiny")
SIZES = ("--samples", "22", "--exact-nfe", "12", "--accurate-nfe", "8", "--batch", "4")


def dlms(processes: int, *words: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """``python -m dlms_engine WORDS`` on so many processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launch += [f"--max-restarts={restarts}"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "dlms_engine"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*command, *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1  # one process prints
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_samples_are_the_same_bits_for_any_number_of_processes(tmp_path: Path) -> None:
    images = []
    for processes in (1, 2):  # two: the last round of three batches is short
        path = tmp_path / f"{processes}.safetensors"
        words = ("sample", *TINY, "--nfe", 4, "--seeds", "0-10", "--batch", 4, "--output", path)
        facts = answer(dlms(processes, *words, "--json"))
        assert facts["images"] == 11
        images.append(load_file(path)["samples"])
    assert images[0].shape == (11, 3, 8, 8)
    assert torch.equal(images[0], images[1])
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}


@pytest.mark.slow
def test_figures_are_the_same_bits_for_any_number_of_processes(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    words = ("evaluate", *TINY, "--method", "ipndm", "--nfe", 4, *SIZES, "--json", "--folder")
    found = [answer(dlms(n, *words, tmp_path / str(n))) for n in (1, 3)]
    assert found[0] == found[1]
    one, two = ({p.name: load_file(p) for p in (tmp_path / n / "cache").iterdir()} for n in "13")
    assert one.keys() == two.keys() and len(one) == 3
    for name, tensors in one.items():
        assert all(torch.equal(tensors[key], two[name][key]) for key in tensors), name
    # what several processes have kept serves one
    assert answer(dlms(1, *words, tmp_path / "3")) == found[0]


@pytest.mark.slow
def test_the_record_is_written_once_and_the_same(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("matplotlib")
    sizes = ("--samples", 8, "--screen-samples", 4, "--exact-samples", 6, "--exact-nfe", 8)
    sizes = (*sizes, "--accurate-nfe", 6, "--full-nfe", "3", "--nfe", "3", "--batch", 2)
    words = ("evaluate", "--record", *TINY, *sizes, "--json", "--folder")
    one, two = (answer(dlms(n, *words, tmp_path / str(n))) for n in (1, 2))
    assert one == two
    assert json.loads((tmp_path / "2" / "record.json").read_text()) == two
    assert (tmp_path / "2" / "record.md").exists()


@pytest.mark.slow
def test_distill_writes_once_and_resumes_by_itself_when_started_again(tmp_path: Path) -> None:
    """A process that dies once (a stand-in network kills it) costs nothing but time."""
    settings = ("batch=8", "validation_samples=4", "validation_steps=8", "checkpoint_seconds=0")
    words = (
        "distill",
        "--method",
        "dlms",
        "--nfe",
        3,
        "--trajectories",
        64,
        *(f"--set={s}" for s in settings),
    )
    whole = tmp_path / "whole.safetensors"
    facts = answer(dlms(2, *words, *TINY, "--output", whole, "--json"))
    assert facts["solver"] == str(whole) and whole.with_suffix(".config.json").exists()
    path = tmp_path / "again.safetensors"
    killed = (*words, "--model", "cli_model:dying", "--output", path, "--json")
    done = dlms(2, *killed, restarts=1)
    answer(done)
    assert "exitcode: -9" in done.stderr
    first, again = load_file(whole), load_file(path)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_failing_command_ends_all_processes(tmp_path: Path) -> None:
    done = dlms(2, "sample", *TINY, "--method", "magic", "--output", tmp_path / "s.png")
    assert done.returncode != 0 and "dlms: rank " in done.stderr and "magic" in done.stderr
    assert not list(tmp_path.iterdir())

"""The program that trains all models at once: its plan, its fallbacks, and a rehearsal."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tqdm")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_models

    return train_models


def look_until(task: Any, logs: Path, seconds: float = 20.0) -> None:
    began = time.monotonic()
    while not task.done and time.monotonic() - began < seconds:
        task.look(time.monotonic() - began, logs)
        time.sleep(0.02)


def test_a_process_that_fails_is_started_again_with_less(program: Any, tmp_path: Path) -> None:
    script = "import sys; sys.exit(sys.argv[1:] != ['b'])"
    task = program.Task(
        "task", lambda added, _left: [sys.executable, "-c", script, *added], 100.0, [],
        ((), ("a",), ("b",), ("c",)),
    )  # fmt: skip
    look_until(task, tmp_path)
    assert task.done and task.attempts == [("c",)]


def test_nothing_is_started_without_its_inputs_or_too_late(program: Any, tmp_path: Path) -> None:
    task = program.Task("task", lambda *_: pytest.fail("started"), 100.0, [tmp_path / "absent"])
    task.look(1.0, tmp_path)
    assert not task.done and task.process is None
    late = program.Task("late", lambda *_: pytest.fail("started"), 100.0, [], shortest=25.0)
    late.look(80.0, tmp_path)
    assert late.done


def test_the_plan_ends_in_time(program: Any, tmp_path: Path) -> None:
    words = [
        "--cifar10",
        "c",
        "--emoji",
        "e",
        "--table",
        "t",
        "--seconds",
        "400",
        "--emoji-until",
        "150",
    ]
    args: argparse.Namespace = program.arguments([*words, "--deliver", str(tmp_path)])
    until = {task.name: task.until for task in program.make_tasks(args)}
    assert until["emoji"] == until["emoji-flow"] == 150
    assert until["cifar10-32"] == 400 - program.CLOSING
    tasks = {task.name: task for task in program.make_tasks(args)}
    words = tasks["cifar10-32"].command(("--no-capture",), 380.0)
    assert words[-3:] == ["--seconds", "380.0", "--no-capture"]


def test_what_is_given_is_trained_and_a_classifier_only_once(program: Any, tmp_path: Path) -> None:
    args = program.arguments(["--cifar10", "c", "--deliver", str(tmp_path)])
    names = [task.name for task in program.make_tasks(args)]
    assert names == ["cifar10-32-images", "cifar10-32", "cifar10-32-features"]
    (tmp_path / "cifar10-32-features.safetensors").touch()
    assert [task.name for task in program.make_tasks(args)] == names[:2]
    for words in ([], ["--emoji", "e"], ["--cifar10", "c", "--table", "t"]):
        with pytest.raises(SystemExit):
            program.arguments([*words, "--deliver", str(tmp_path)])


@pytest.mark.slow
def test_the_rehearsal_delivers_every_file(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "train_models.py"), "--rehearse"]
    command += ["--work", str(tmp_path / "work"), "--deliver", str(tmp_path / "out")]
    command += ["--seconds", "160", "--emoji-until", "80", "--save-every", "20"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=280, env=os.environ
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cifar10-32-features.safetensors",
        "cifar10-32.safetensors",
        "emoji-features.safetensors",
        "emoji-flow.safetensors",
        "emoji.safetensors",
        "log.tar.gz",
        "samples.png",
    ]

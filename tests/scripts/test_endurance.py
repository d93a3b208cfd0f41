"""scripts/endurance in short: the long runs themselves are started by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "endurance"))

import damaged  # noqa: E402
import kills  # noqa: E402
import threads  # noqa: E402

from dlms_engine.solvers.file import SolverFileError  # noqa: E402

# Python 3.12 warns of any thread beside a fork; the children run nothing that those hold.
# Export has its own deprecations, which are no errors in a command.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_few_kills_leave_nothing_that_differs() -> None:
    found = kills.kills(2, ["sample", "gits"])
    assert found["kills"] >= 2 and not found["different"]


@pytest.mark.slow
def test_kills_of_every_command() -> None:
    """Among them the default method, the comparison and the record, which resume by folder."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchmetrics")
    found = kills.kills(20)
    assert set(found["of"]) == set(kills.COMMANDS) and not found["different"]


@pytest.mark.slow
def test_two_of_a_command_in_one_folder() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchmetrics")
    found = kills.pairs(3)
    assert not found["died"] and not found["different"]


def test_a_command_that_does_not_go_on_where_it_was_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(name: str, folder: Path, again: bool) -> Callable[[], None]:
        def run() -> None:
            (folder / "made.json").write_text(json.dumps({"went on": again, "seconds": 1}))

        return run

    monkeypatch.setattr(kills, "command", forgetful)
    found = kills.kills(2, ["sample"])
    assert found["different"][0]["parts"] == ["made.json"]


def test_a_command_that_does_not_bear_another_beside_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exclusive(name: str, folder: Path, again: bool) -> Callable[[], None]:
        return (folder / "only one").mkdir

    monkeypatch.setattr(kills, "command", exclusive)
    assert kills.pairs(2)["died"] == 2


def test_calls_from_four_threads_give_their_own_bits() -> None:
    found = threads.threads(400)
    assert found["different"] == 0 and not found["grew"]


def test_damaged_files_are_refused_and_run_nothing() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "endurance"), "damaged", "400"]
    ran = subprocess.run(command, capture_output=True, text=True)  # memory is of a whole process
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert found["solver refused"] > 350 and found["pickle refused"] > 40


def lets_an_error_through(path: Path) -> Any:
    return path.read_bytes()[100_000]


def takes_long(path: Path) -> Any:
    while time.thread_time() < until[0]:
        pass
    raise SolverFileError("late")


def takes_much(path: Path) -> Any:
    bytearray(damaged.peak() - threads.resident() + (300 << 20))
    raise SolverFileError("large")


until = [0.0]
"""When ``takes_long`` has taken long enough."""


@pytest.mark.parametrize(
    ("careless", "fault"),
    [
        (lets_an_error_through, "untyped"),
        (takes_long, "over 1 s or 200 MB"),
        (takes_much, "over 1 s or 200 MB"),
    ],
)
def test_a_reader_with_a_fault_is_found(
    careless: Callable[[Path], Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    until[0] = time.thread_time() + 1.1
    monkeypatch.setattr("dlms_engine.policies.distilled.load_solver", careless)
    monkeypatch.setattr(damaged, "crafted", lambda rng, count: [])
    assert damaged.damaged(3)[fault]

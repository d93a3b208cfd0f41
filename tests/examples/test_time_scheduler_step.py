"""The timing of one scheduler step: it runs to its end, on the steps it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")


def test_every_scheduler_is_timed(
    example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It took one step again and again, which the engine's scheduler refuses after the last."""
    program = example("integrations.time_scheduler_step")
    threads = torch.get_num_threads()
    program.main(["--rounds", "1", "--shape", "1", "1", "2", "2"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [name for name, _, _ in program.CASES]


@pytest.mark.parametrize(("timed", "expected"), [(range(12, 16), 2.0), (range(20), 1e6)])
def test_only_the_steps_in_between_are_timed(
    timed: range, expected: float, example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second case is planted: the first steps, which take long, count there."""
    program = example("integrations.time_scheduler_step")

    class Scheduler:
        clock = 0.0

        def set_timesteps(self, count: int) -> None:
            self.timesteps = torch.arange(count)

        def step(self, _output: Any, t: Any, x: Any, **_options: Any) -> Any:
            self.clock += 2e-6 if int(t) in range(12, 16) else 1.0
            return (x,)

    scheduler, x = Scheduler(), torch.zeros(1)
    monkeypatch.setattr(program, "TIMED", timed)
    monkeypatch.setattr(program.time, "perf_counter", lambda: scheduler.clock)
    assert program.microseconds(scheduler, x, x, 2) == pytest.approx(expected, rel=1e-3)

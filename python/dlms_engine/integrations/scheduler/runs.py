"""The state of a scheduler's runs: one a thread, so that callers never see each other's."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .runner import Runner


@dataclass
class SchedulerRun:
    """Everything a scheduler carries between ``set_timesteps`` and the last step.

    Attributes:
        runner: rows, levels, latents and history; None before the first ``set_timesteps``.
        step_index: of the next step; None before the first.
        thread: who took the first step.
        order: as ``DLMSScheduler.order``; None before the first ``set_timesteps``.
    """

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None = None
    runner: Runner | None = None
    step_index: int | None = None
    begin_index: int | None = None
    thread: int | None = None
    order: int | None = None


class SchedulerRuns:
    """The calling thread's run; a thread without one takes the newest, if no thread steps it."""

    def __init__(self, newest: SchedulerRun | None = None) -> None:
        self._own = threading.local()
        self._newest = newest

    def __reduce__(self) -> Any:
        run = self.current()
        if run is not None:  # a copy goes on wherever it is taken
            run = SchedulerRun(**{**vars(run), "thread": None})
        return (SchedulerRuns, (run,))

    def begin(self, run: SchedulerRun) -> None:
        """``run`` is this thread's from now on."""
        self._own.run = self._newest = run

    def current(self) -> SchedulerRun | None:
        """The run of this thread, or the newest one."""
        run: SchedulerRun | None = getattr(self._own, "run", None)
        return self._newest if run is None else run

    def stepping(self) -> SchedulerRun:
        """The run whose next step this thread takes.

        Raises:
            ValueError: another thread is taking its steps.
        """
        run = self.current()
        assert run is not None
        me = threading.get_ident()
        if run.thread is None:
            run.thread, self._own.run = me, run
        elif run.thread != me:
            raise ValueError(
                "this run was begun by another thread: call set_timesteps in the thread that steps, "
                "or give each thread a copy of the scheduler"
            )
        return run

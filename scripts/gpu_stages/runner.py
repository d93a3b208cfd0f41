"""Runs stages as processes of their own: side by side or alone, each under its limit.

A stage that runs over is ended with everything it started; the others go on. After each stage the
report is written, so that whenever this process is ended, what came before is there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 3.0
"""Seconds between asking a stage to end and ending it."""
REHEARSAL = 300.0
"""Limit of a stage in a rehearsal, which shows that it runs, not how quickly."""
LEAST = 6.0
"""A stage that has less time than this is not started: it could not even import torch."""


@dataclass(frozen=True)
class Stage:
    """One process, or several in turn.

    Attributes:
        name: unique; its log is NAME.log, its report NAME.json.
        measures: what it says on a GPU, for people.
        commands: argument lists; "python" stands for the Python that runs this.
        limit: seconds.
        cores: how many it keeps busy.
        stand_in: the commands of a rehearsal; empty where nothing can stand in.
        environment: added to the process's.
        refusal: a text that a rehearsal's last command has to end with status 2 and say.
    """

    name: str
    measures: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    cores: int = 1
    stand_in: tuple[tuple[str, ...], ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    refusal: str = ""


@dataclass(frozen=True)
class Group:
    """Stages that run side by side, or (`alone`) one after the other with the GPU to themselves."""

    name: str
    stages: tuple[Stage, ...]
    alone: bool = False


@dataclass
class Outcome:
    """What became of a stage."""

    stage: Stage
    status: str
    seconds: float


class Running:
    """A stage at work."""

    def __init__(self, stage: Stage, runner: Runner, limit: float) -> None:
        self.stage = stage
        self._runner = runner
        self._commands = list(runner.commands_of(stage))
        self._start = time.monotonic()
        self._end = self._start + limit
        self._log = (runner.work / f"{stage.name}.log").open("ab")
        self._next()

    def _next(self) -> None:
        words = self._commands.pop(0)
        command = [sys.executable if word == "python" else word for word in words]
        self._log.write(f"$ {' '.join(words)}\n".encode())
        self._log.flush()
        environment = {**self._runner.environment, **self.stage.environment}
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._runner.root,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._log.write(f"{error}\n".encode())
            self._process = None

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        if self._process is None:
            return self._close("failed (cannot be started)")
        status = self._process.poll()
        if status is None:
            if time.monotonic() < self._end:
                return None
            self.stop()
            return self._close("out of time")
        if self._runner.rehearse and self.stage.refusal and not self._commands:
            said = self.stage.refusal in self._text()
            return self._close("passed" if status == 2 and said else f"failed ({status})")
        if status:
            return self._close(f"failed ({status})")
        if self._commands:
            self._next()
            return None
        return self._close("passed")

    def _text(self) -> str:
        return (self._runner.work / f"{self.stage.name}.log").read_text(errors="replace")

    def stop(self) -> None:
        """Ends the stage and whatever it started.

        An interrupt comes first: a Python program then says where it was, and pytest what failed.
        """
        if self._process is None:
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._process.send_signal(number)
            try:
                self._process.wait(GRACE)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _close(self, status: str) -> Outcome:
        self._log.close()
        return Outcome(self.stage, status, time.monotonic() - self._start)


class Runner:
    """Runs groups within a budget.

    Args:
        root: where commands run.
        work: folder of logs and of the stages' own reports.
        budget: seconds in all.
        environment: of every process.
        rehearse: run the stand-ins.
        after: called with each outcome; writes the report.
    """

    def __init__(
        self,
        root: Path,
        work: Path,
        budget: float,
        environment: dict[str, str],
        *,
        rehearse: bool,
        after: Callable[[Outcome], None],
        cores: int | None = None,
    ) -> None:
        self.root, self.work, self.rehearse = root, work, rehearse
        self.environment = environment
        self.outcomes: list[Outcome] = []
        self._after = after
        self._end = time.monotonic() + budget
        self._cores = cores or os.cpu_count() or 1

    def left(self) -> float:
        """Seconds of the budget."""
        return self._end - time.monotonic()

    def commands_of(self, stage: Stage) -> tuple[tuple[str, ...], ...]:
        """What is run: in a rehearsal what stands in."""
        return stage.stand_in if self.rehearse else stage.commands

    def run(self, group: Group, reserve: float = 0.0) -> None:
        """Runs a group; ``reserve`` seconds of the budget are kept for what follows."""
        end = self._end - reserve
        waiting = [stage for stage in group.stages if self._possible(stage)]
        running: list[Running] = []
        try:
            while waiting or running:
                for job in list(running):
                    outcome = job.poll()
                    if outcome is not None:
                        running.remove(job)
                        self._done(outcome)
                self._start(waiting, running, end, group.alone)
                time.sleep(0.05)
        finally:
            for job in running:
                job.stop()

    def _possible(self, stage: Stage) -> bool:
        if self.commands_of(stage):
            return True
        self._done(Outcome(stage, "nothing stands in for it", 0.0))
        return False

    def _start(self, waiting: list[Stage], running: list[Running], end: float, alone: bool) -> None:
        """Starts what there are cores for, in order; a large stage holds up those after it."""
        while waiting:
            busy = sum(min(job.stage.cores, self._cores) for job in running)
            stage = waiting[0]
            if running and (alone or busy + min(stage.cores, self._cores) > self._cores):
                return
            waiting.pop(0)
            left = end - time.monotonic()
            if left < min(LEAST, stage.limit):
                self._done(Outcome(stage, "no time left", 0.0))
                continue
            limit = REHEARSAL if self.rehearse else stage.limit
            running.append(Running(stage, self, min(limit, left)))

    def _done(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._after(outcome)


def select(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """The groups with the stages that are named, by a group's name or their own; all without names.

    Raises:
        ValueError: a name that is neither.
    """
    known: dict[str, Any] = {group.name: group for group in groups}
    known |= {stage.name: stage for group in groups for stage in group.stages}
    for name in names:
        if name not in known:
            raise ValueError(f"no stage {name!r}; there are {', '.join(known)}")
    if not names:
        return list(groups)
    chosen = []
    for group in groups:
        wanted = group.stages if group.name in names else ()
        stages = tuple(s for s in group.stages if s in wanted or s.name in names)
        if stages:
            chosen.append(Group(group.name, stages, group.alone))
    return chosen

"""How much a run may cost: minutes, or network evaluations of one sample."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..start import SamplingProblem

_FORM = re.compile(r"^\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*(s|m|min|h|calls|k|)\s*$")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "": 60.0, "h": 3600.0}


SPEED_BATCH = 16
"""Samples by which the speed is measured where nothing else was called, as many as a first iteration."""


@dataclass(frozen=True)
class Limit:
    """``seconds`` and ``calls``; infinite where not limited."""

    seconds: float = math.inf
    calls: float = math.inf


def parse_budget(text: str | float | int) -> Limit:
    """``10``, ``"10m"``, ``"1.5h"``, ``"90s"``, ``"50000calls"``, ``"50k"``.

    Raises:
        ValueError: anything else, or nothing at all.
    """
    match = _FORM.match(str(text))
    amount = float(match[1].replace("_", "").replace(",", "")) if match else 0.0
    if match is None or not amount > 0:
        raise ValueError(
            f"budget is {text!r}, expected minutes (10, '10m', '2h', '90s') or network evaluations "
            "of one sample ('50000calls', '50k')"
        )
    unit = match[2]
    if unit in ("calls", "k"):
        return Limit(calls=amount * (1000 if unit == "k" else 1))
    return Limit(seconds=amount * _SECONDS[unit])


class Budget:
    """What is left, in evaluations of one sample; time is counted by the speed so far."""

    def __init__(self, limit: Limit, problem: SamplingProblem) -> None:
        self.limit, self.problem = limit, problem
        self._started, self._first = time.perf_counter(), problem.calls
        self.interrupted = False
        self._mark = 0, 0.0  # calls and seconds from which on the speed is counted

    def measure_speed(self) -> None:
        """Counts the speed from here on, where it limits: a kept start called next to nothing, and
        what loading and the first calls of a network took says nothing of the later ones.
        """
        if not math.isfinite(self.limit.seconds):
            return
        evaluate = self.problem.evaluation(SPEED_BATCH)
        evaluate()  # warms up
        self._mark = self.calls, self.seconds
        for _ in range(2):
            evaluate()

    def set(self, calls: int, seconds: float) -> None:
        """Goes on counting from ``calls`` and ``seconds``."""
        self.problem.calls = self._first + calls
        self._started = time.perf_counter() - seconds
        self._mark = 0, 0.0

    def count(self, calls: int, share: float) -> None:
        """Evaluations of an earlier run, if they are what is limited: what a run finds must not
        depend on what the one before it left behind. Time that was saved is there to be used.

        Args:
            share: of the budget that they count for at most.
        """
        if math.isfinite(self.limit.calls):
            self.problem.calls += min(calls, int(share * self.limit.calls))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def calls(self) -> int:
        return self.problem.calls - self._first

    def share(self) -> float:
        """What has been used, 0 to 1 and above; all of it after an interrupt."""
        if self.interrupted:
            return math.inf
        return max(self.seconds / self.limit.seconds, self.calls / self.limit.calls)

    def left(self) -> float:
        """Evaluations that may still be made."""
        by_calls = self.limit.calls - self.calls
        if not math.isfinite(self.limit.seconds) or self.calls == 0:
            return by_calls
        return min(by_calls, (self.limit.seconds - self.seconds) * self._rate())

    def whole(self) -> float:
        """Evaluations that all of it pays for, by what is left."""
        return self.left() / max(1 - self.share(), 1e-9)

    def _rate(self) -> float:
        """Evaluations a second, so far."""
        calls, seconds = self._mark
        return (self.calls - calls) / max(self.seconds - seconds, 1e-9)

    def worth(self, seconds: Callable[[], float]) -> float:
        """Evaluations that ``seconds`` of other work are worth; none where time is not limited, and
        nothing is measured then.
        """
        return seconds() * self._rate() if math.isfinite(self.limit.seconds) else 0.0

    def left_until(self, share: float) -> float:
        """Evaluations that may be made before ``share`` of the budget is used."""
        used, left = self.share(), self.left()
        if not math.isfinite(left):
            return left
        return self.whole() * (share - used) if used < share else 0.0

"""What a benchmark on a GPU is to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GPU = "H200"
"""The GPU that the figures to reach are meant for."""


@dataclass(frozen=True)
class Target:
    """One figure to reach. ``measured`` None means that it was not measured, for ``reason``."""

    what: str
    limit: float
    sense: Literal["at most", "at least"]
    unit: str
    measured: float | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """``reached``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        low = self.sense == "at most"
        reached = self.measured <= self.limit if low else self.measured >= self.limit
        return "reached" if reached else "missed"

    def line(self) -> str:
        """One line for people."""
        head = f"{self.verdict:<13} {self.what}: {self.sense} {self.limit:g} {self.unit}"
        if self.measured is None:
            return f"{head} ({self.reason})"
        return f"{head}, measured {self.measured:.3g}"


def as_json(targets: Sequence[Target], gpu: str) -> list[dict[str, Any]]:
    """Every target with its verdict, and whether this is the GPU it is meant for."""
    return [
        {**vars(target), "verdict": target.verdict, "gpu_it_is_for": GPU in gpu}
        for target in targets
    ]


def show(targets: Sequence[Target], gpu: str) -> None:
    """Prints one line for each."""
    note = "" if GPU in gpu else f", though this is not the {GPU} they are meant for"
    print(f"\nto reach{note}:")
    for target in targets:
        print(f"  {target.line()}")

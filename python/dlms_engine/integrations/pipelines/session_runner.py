"""A scheduler's run that a recording or a dry run listens to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..scheduler.runner import Runner
from .dry_run import DryRun
from .recording import Recorder


class SessionRunner(Runner):
    """A run whose steps a session hears of, or takes over."""

    session: Any = None
    finish: Callable[[DryRun], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "session": None, "finish": None}  # no session listens to a copy

    def begin(self, index: int) -> None:
        """As always; a session scales the first input where the pipeline does not."""
        scaled = self._was_scaled
        self._was_scaled = scaled or self.session is not None
        super().begin(index)
        self._was_scaled = scaled

    def unscaled_factor(self) -> float:
        """The first input's scale, where the pipeline does not apply it; else 1."""
        return 1.0 if self._was_scaled else self.plan_of(self._prepared).c_in[self._prepared]

    def advance(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        """Row ``n``: recorded, answered by a stand-in, or at a dry run's end the engine's result."""
        if isinstance(self.session, DryRun):
            assert self.finish is not None
            return self.session.step(n, self.shaped_output(output, sample), sample, self.finish)
        latents = super().advance(n, output, sample)
        if isinstance(self.session, Recorder):
            self.session.step(self, n, self.shaped_output(output, sample), sample, latents)
        return latents

    def predicted(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        """As always, and not in the engine's loop, whose steps have no predictions of their own."""
        reads = "the pipeline reads the scheduler's data prediction"
        if isinstance(self.session, DryRun):
            self.session.fail(reads)
        if isinstance(self.session, Recorder):
            self.session.reason = reads
        return super().predicted(n, output, sample)

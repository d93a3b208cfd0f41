"""The many-step teacher: DPM-Solver++ on the student's own segments (DLMS section 3.1).

Lu et al. 2022b (arXiv:2211.01095), data prediction, per-sample times; the history is kept across
segments, so that one interpolation step is a real multistep teacher and not DDIM plus one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser, per_sample
from ...processes import Process
from ...solvers.dpm_solver import multistep_sum
from ...solvers.trace import Form
from ..training.coerce import check_least


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of the teacher.

    Attributes:
        interpolation: M >= 0 points inside each student interval; M + 1 sub-steps.
        order: 1 to 3; 2 is used when there is one point or less, and for latent models.
        keep_history: keep the earlier outputs when the next segment begins.
    """

    interpolation: int = 4
    order: int = 3
    keep_history: bool = True

    def __post_init__(self) -> None:
        check_least(self, "teacher_", interpolation=0, order=1)
        if self.order > 3:
            raise ValueError(f"teacher_order is {self.order}, expected 1..3")


class Teacher:
    """Carries one batch of teacher trajectories from segment to segment, without gradients."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: TeacherSettings,
        x: Tensor,
        segments: int,
        conditions: dict[str, Any],
    ) -> None:
        self._denoiser = denoiser
        self._settings = settings
        self._order = min(settings.order, 2) if settings.interpolation <= 1 else settings.order
        self._conditions = conditions
        self._left = segments * (settings.interpolation + 1)
        self._history: list[tuple[Tensor, Tensor]] = []  # (time [B], data prediction), newest first
        self.x = x

    @torch.no_grad()
    def advance(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Carries the state from ``t`` ``[B]`` to ``t_next`` ``[B]`` (float64) and returns it."""
        if not self._settings.keep_history:
            self._history.clear()
        times = self._subdivide(t, t_next)
        for here, there in itertools.pairwise(times):
            self._step(here, there)
        return self.x

    def _subdivide(self, t: Tensor, t_next: Tensor) -> list[Tensor]:
        """M + 1 sub-steps uniform in lambda, or in t where lambda is infinite at an end."""
        process = self._denoiser.process
        count = self._settings.interpolation + 1
        start, end = process.lambda_(t), process.lambda_(t_next)
        inner = [i / count for i in range(1, count)]
        finite = torch.isfinite(start) & torch.isfinite(end)  # chosen without asking the device
        points = [
            torch.where(
                finite, process.inverse_lambda(start + f * (end - start)), t + f * (t_next - t)
            )
            for f in inner
        ]
        return [t, *points, t_next]

    def _step(self, t: Tensor, t_next: Tensor) -> None:
        """One evaluation and its row, as one piece of work for captured evaluations."""
        denoiser = self._denoiser
        known = self._history[: self._order - 1]
        order = min(len(known) + 1, self._left)
        inputs = {"x": self.x, "t": t, "t_next": t_next}
        for k, (time, data) in enumerate(known[: order - 1]):
            inputs |= {f"t/{k}": time, f"data/{k}": data}

        def work(given: Mapping[str, Tensor], conditions: dict[str, Any]) -> tuple[Tensor, ...]:
            past = [(given[f"t/{k}"], given[f"data/{k}"]) for k in range(order - 1)]
            start, end = given["t"], given["t_next"]
            data = denoiser.predict(given["x"], start, "data", **conditions)
            history = [(start, data), *past]
            return _row(denoiser.process, given["x"], end, history), data

        made = denoiser.calls.as_one(
            denoiser, ("teacher", order), work, inputs, dict(self._conditions)
        )
        self.x = made[0]
        self._history = [(t, made[1]), *known]
        self._left -= 1


def _row(
    process: Process, x: Tensor, t_next: Tensor, history: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The state at ``t_next`` from ``x`` and (time, data prediction), the newest of them at ``x``."""
    t = history[0][0]
    lambdas = [process.lambda_(time) for time, _ in history]
    weights = multistep_weights(process.lambda_(t_next) - lambdas[0], lambdas)
    ratio = process.sigma(t_next) / process.sigma(t)
    gain = process.alpha(t_next) - process.alpha(t) * ratio
    x = per_sample(ratio, x) * x
    for w, (_, m) in zip(weights, history, strict=True):
        x = x + per_sample(gain * w, x) * m
    return x


def multistep_weights(h: Tensor, lambdas: list[Tensor]) -> list[Tensor]:
    """Weights, summing to 1, of the data predictions in one DPM-Solver++(kM) step.

    Args:
        h: ``[B]`` step in lambda. lambdas: of the outputs, newest first, 1 to 3 of them.

    Steps next to an infinite lambda are first order, as the weights of the rest vanish there.
    """
    one = torch.ones_like(h)
    shrink = torch.expm1(-h)
    second = shrink / -h - 1
    third = second / -h - 0.5
    integrals = one, -second / shrink, -third / shrink  # of a step whose gain is 1
    units = [Form({}, {k: one}) for k in range(len(lambdas))]
    weights, usable = units[0].outputs, torch.isfinite(h)
    for order in range(2, len(lambdas) + 1):  # chosen without asking the device
        usable = usable & torch.isfinite(lambdas[order - 2]) & torch.isfinite(lambdas[order - 1])
        higher = multistep_sum(units[:order], lambdas[:order], h, integrals).outputs
        lower = (weights.get(k, torch.zeros_like(h)) for k in range(order))
        weights = {k: torch.where(usable, higher[k], low) for k, low in enumerate(lower)}
    return [weights[k] for k in range(len(lambdas))]

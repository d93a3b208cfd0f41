"""A corrector after every row, trained through the network on the end of the run.

Corrected states are better places for the next evaluation, so a corrector after row n lowers the
error of all rows after it; the last row's alone can only repair what is left. Gradients go through
the evaluations between, so the network must give them; where it does not, the phase is left out,
with a word. It starts at the table with the last row's corrector, and the table's weights go along.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...policies.corrector import CorrectedPolicy, Corrector, CorrectorSettings
from ...solvers.table import SolverTable
from ...support.optimiser import optimiser_step
from ...support.transfer import host_numbers, to_host
from ..start import SamplingProblem
from .budget import Budget
from .correct import LARGEST, scale_to, settings_for
from .runs import RUN_BATCH, batches, states_of

_log = logging.getLogger("dlms_engine")

LEAST_BATCH, MOST_BATCH = 16, 256
BATCH_NUMBERS = 1024
"""Numbers of a batch, within these bounds: small batches get further with as many evaluations."""
BACKWARD = 2
"""Evaluations that the backward pass of one counts as."""
LEAST_UPDATES, WANTED_UPDATES, MOST_UPDATES = 30, 300, 6000
CHECKS = 12
"""How often the averaged parameters are measured on the samples kept apart."""
MOST_HELD = 128
RATE, WEIGHT_RATE = 4e-3, 1e-3
SCALED = 64
"""Samples that the correctors' inputs are scaled by."""


def widths_for(
    shape: tuple[int, ...], nfe: int, depth: int, last: CorrectorSettings
) -> list[CorrectorSettings] | None:
    """Settings of every row's corrector, the last row's as it is; None if they would be too large
    for a solver file even when narrow.
    """
    own = settings_for(shape, depth)
    if own is None:
        return None
    for width in (last.width, 24, 16, 12, 8):
        every = [
            dataclasses.replace(own, width=min(width, last.width), outputs=min(n + 1, last.outputs))
            for n in range(nfe - 1)
        ]
        if sum(map(_numbers, [*every, last])) <= LARGEST:
            return [*every, last]
    return None


def _numbers(settings: CorrectorSettings) -> int:
    return sum(p.numel() for p in Corrector(settings).parameters())


def fit_every_row(
    problem: SamplingProblem,
    table: SolverTable,
    last: Corrector,
    target: Tensor,
    budget: Budget,
    share: float,
    *,
    say: Callable[[str], None] = lambda line: None,
    interrupted: Callable[[], None] | None = None,
) -> tuple[CorrectedPolicy, dict[str, float]] | None:
    """Trained correctors of all rows and their table; None where the phase is left out.

    Args:
        last: corrector of the last row, trained; it is not changed.
        target: exact ends of the samples 0 .. len(target) - 1; the last of them choose.
        share: of the budget that may be used when it is done.
        interrupted: called at Ctrl-C, which then ends the training and keeps its best; None raises.
    """
    if table.nfe < 2 or not gives_gradients(problem):
        if table.nfe > 1:
            say("no correctors of earlier rows: the network gives no gradients")
        return None
    each = (1 + BACKWARD) * table.nfe
    settings = widths_for(problem.shape, table.nfe, table.depth, last.settings)
    left = min(budget.left_until(share), 1e12)
    if settings is None or left < LEAST_UPDATES * LEAST_BATCH * each:
        return None
    say(f"correctors of all {table.nfe} rows, trained through the network")
    run = EveryRow(problem, table, last, settings, target)
    run.batch = max(LEAST_BATCH, min(run.batch, int(left / (WANTED_UPDATES * each))))
    began = budget.share()

    def progress() -> float:
        return (budget.share() - began) / max(share - began, 1e-9)

    try:
        run.train(progress)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        interrupted()
        run.keep_if_better()
    except RuntimeError as error:  # no memory for the pass, an operation without a derivative
        _log.warning("correctors of earlier rows: stopped after %d updates: %s", run.done, error)
    say(f"  RMSE {run.first:.5f} -> {run.best:.5f} on samples not fitted, {run.done} updates")
    if not run.best < run.first:
        return None
    return run.result(), {"updates": float(run.done), "before": run.first, "after": run.best}


def batch_for(shape: tuple[int, ...]) -> int:
    """Samples of an update."""
    return min(MOST_BATCH, max(LEAST_BATCH, BATCH_NUMBERS // math.prod(shape)))


def gives_gradients(problem: SamplingProblem) -> bool:
    """Whether the network's output has a gradient in its input."""
    numbers = range(1)
    x = problem.noise(numbers).requires_grad_()
    denoiser, t = problem.denoiser, problem.process.t_max
    try:
        with torch.enable_grad():
            dtype = denoiser.network_dtype or x.dtype
            level = denoiser.preconditioning(torch.tensor([t], dtype=torch.float64)).c_noise
            problem.calls += 1
            out = denoiser.network_output(
                x.to(dtype), level.to(x.device), **problem.condition(numbers)
            )
    except RuntimeError as error:
        _log.info("no gradients: %s", error)
        return False
    first = out if isinstance(out, Tensor) else out[0]
    return bool(first.requires_grad)


class EveryRow:
    """One training run.

    Attributes:
        first, best: RMSE on the samples kept apart, at the start and of what is kept.
        done: updates.
    """

    def __init__(
        self,
        problem: SamplingProblem,
        table: SolverTable,
        last: Corrector,
        settings: Sequence[CorrectorSettings],
        target: Tensor,
    ) -> None:
        self.problem, self.table, self.target = problem, table, target
        self.batch = batch_for(problem.shape)
        self.held = min(MOST_HELD, max(1, len(target) // 8))
        self.fitted = len(target) - self.held
        self.parts = self._initial(last, settings)
        self.weights = (
            table.a.float().to(target.device).requires_grad_(),
            table.b.float().to(target.device).requires_grad_(),
        )
        self.trained = [*nn.ModuleList(self.parts).parameters(), *self.weights]
        self.kept = self._copy()
        self.averaged = self._copy()
        self.first = self.best = self._held_error()
        self.done = 0

    def _initial(self, last: Corrector, settings: Sequence[CorrectorSettings]) -> list[Corrector]:
        count = min(SCALED, len(self.target))
        with torch.no_grad():
            states = states_of(self.problem, self.table, range(count))
        (error,) = host_numbers([(self.target[:count] - states[-1][0]).std()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = [Corrector(each) for each in settings]
        for part, (x, outputs) in zip(parts, states, strict=True):
            scale_to(part, x, outputs, error)
        parts = [part.to(self.target.device).requires_grad_() for part in parts]
        parts[-1].load_state_dict(last.state_dict())
        return parts

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def _load(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.copy_(value)

    def _squares(self, numbers: range) -> Tensor:
        end = states_of(self.problem, self.table, numbers, self.parts, self.weights)[-1][0]
        return (end - self.target[numbers.start : numbers.stop]).square().mean()

    @torch.no_grad()
    def _held_error(self) -> float:
        parts = batches(range(self.fitted, len(self.target)), RUN_BATCH)
        means = host_numbers([self._squares(numbers) for numbers in parts])
        total = sum(mean * len(numbers) for mean, numbers in zip(means, parts, strict=True))
        return math.sqrt(total / self.held)

    def train(self, progress: Callable[[], float]) -> None:
        """Adam with a cosine, averaged; what is best on the samples kept apart is kept.

        Args:
            progress: from 0 to 1, where training ends: the share of its budget that is used.
        """
        optimiser = torch.optim.AdamW(
            [
                {"params": self.trained[:-2], "weight_decay": 1e-3},
                {"params": self.trained[-2:], "weight_decay": 0.0},
            ]
        )
        generator = torch.Generator().manual_seed(3)
        scale = max(self.first**2, 1e-30)
        places = max(1, self.fitted - self.batch + 1)
        done, checked = 0.0, 0.0
        while done < 1:
            low = int(torch.randint(places, (1,), generator=generator))
            cosine = 0.5 + 0.5 * math.cos(math.pi * done)
            for group, rate in zip(optimiser.param_groups, (RATE, WEIGHT_RATE), strict=True):
                group["lr"] = rate * cosine
            self._update(optimiser, range(low, min(low + self.batch, self.fitted)), scale)
            done = max(progress(), self.done / MOST_UPDATES)
            if done - checked >= 1 / CHECKS or done >= 1:
                checked = done
                self.keep_if_better()

    def _update(self, optimiser: torch.optim.Optimizer, numbers: range, scale: float) -> None:
        with torch.enable_grad():
            loss = self._squares(numbers) / scale
            gradients = torch.autograd.grad(loss, self.trained)
        self.problem.calls += BACKWARD * self.table.nfe * len(numbers)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        if math.isfinite(*host_numbers([norm])):
            optimiser_step(optimiser)
        self.done += 1
        weight = min(0.98, self.done / (10 + self.done))
        with torch.no_grad():
            for average, parameter in zip(self.averaged, self.trained, strict=True):
                average.lerp_(parameter, 1 - weight)

    def keep_if_better(self) -> None:
        """Measures the averaged parameters on the samples kept apart."""
        present = self._copy()
        self._load(self.averaged)
        error = self._held_error()
        if error < self.best:
            self.best, self.kept = error, [value.clone() for value in self.averaged]
        self._load(present)

    def result(self) -> CorrectedPolicy:
        """The policy of what is kept."""
        self._load(self.kept)
        a, b = (to_host(weight).double() for weight in self.weights)
        return CorrectedPolicy(dataclasses.replace(self.table, a=a, b=b), self.parts)

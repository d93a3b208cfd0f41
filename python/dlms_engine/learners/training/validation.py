"""Fixed validation of a solver: the same noise, the model's exact solution, every time."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import solvers
from ...engine.noise import seeded_noise
from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser
from ...processes import EDM, grids
from ...solvers.table import SolverTable
from ...support.progress import inner_progress_shown
from ...support.transfer import host_numbers
from ..start import Conditions, ExactSolution, Proof, SamplingProblem
from .losses import FeatureDistance
from .noise import numbered_as_before, tell_first_sample

_log = logging.getLogger("dlms_engine")
_PROOFS: weakref.WeakKeyDictionary[Denoiser, Proof] = weakref.WeakKeyDictionary()
FIRST_SEED = 900_000_000
"""Validation seeds, apart from those of training and of the published tables."""
_BATCH = 16
"""Samples at a time."""


def exact_solution(denoiser: Denoiser, noise: Tensor, steps: int, **conditions: Any) -> Tensor:
    """The end of the probability-flow ODE from ``noise``, by at least ``steps`` evaluations.

    On EDM's process DPM-Solver++(3M) on the polynomial grid. On others that pair can be further from
    the solution than a four-step solver (a flow: 0.065 with 24 evaluations), so the solver and the
    grid are those on which two solvers agree best on this model (``learners.start``), and the
    evaluations at least those they were compared with.
    """
    return KeptSolution(denoiser, steps)(noise, **conditions)


class KeptSolution:
    """``exact_solution`` in update after update: the table takes the host 20 ms, and is made once."""

    def __init__(self, denoiser: Denoiser, steps: int) -> None:
        self._denoiser = denoiser
        self._steps = steps
        self._sampler: Sampler | None = None

    def __call__(self, noise: Tensor, **conditions: Any) -> Tensor:
        if self._sampler is None:
            table = accurate_table(self._denoiser, noise.shape[1:], self._steps, conditions)
            self._sampler = Sampler(self._denoiser, table)
        out = self._sampler(noise, progress=inner_progress_shown(), **conditions)
        assert isinstance(out, Tensor)
        return out


def accurate_table(
    denoiser: Denoiser, shape: torch.Size, steps: int, conditions: Conditions
) -> SolverTable:
    """The table of ``exact_solution``; found once a denoiser."""
    process = denoiser.process
    if isinstance(process, EDM):
        return solvers.dpm_solver_pp(process, grids.polynomial(process, steps), order=3)
    proof = _PROOFS.get(denoiser)
    if proof is None:
        problem = SamplingProblem(denoiser, tuple(shape), conditions or None)
        with numbered_as_before(denoiser):
            proof = _PROOFS[denoiser] = ExactSolution(problem, samples=4).prove()
        _log.info("%s", proof.line())
    return proof.table(process, max(steps, proof.steps))


class Validation:
    """Endpoint errors on ``samples`` fixed noises; the exact solution is computed once, on demand."""

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        samples: int,
        steps: int,
        distance: FeatureDistance | None,
        score: str,
        conditions: dict[str, Any],
    ) -> None:
        if score != "rmse" and distance is None:
            raise ValueError(f"score={score!r} needs a feature distance: set last_step")
        self._denoiser = denoiser
        self._shape = shape
        self._samples = samples
        self._steps = steps
        self._distance = distance
        self._score = score
        self._conditions = conditions
        self._pair: tuple[Tensor, Tensor] | None = None

    def pair(self) -> tuple[Tensor, Tensor]:
        """(noise, exact end)."""
        if self._pair is None:
            process = self._denoiser.process
            sigma = float(
                process.sigma(torch.tensor(process.t_max, dtype=torch.float64, device="cpu"))
            )
            seeds = range(FIRST_SEED, FIRST_SEED + self._samples)
            noise = seeded_noise(seeds, self._shape, sigma, device=self._denoiser.device)
            solve = partial(self._solve, noise)
            kept = getattr(self._denoiser, "kept_solution", None)  # a denoiser with a folder
            self._pair = noise, (solve() if kept is None else kept(noise, self._steps, solve))
        return self._pair

    @torch.no_grad()
    def measure(self, sampler: Sampler, conditions: dict[str, Any]) -> dict[str, float]:
        """``rmse``, ``features`` (mean squared feature distance) and the ``score``."""
        noise, exact = self.pair()
        squares, features = [], []
        for part, state in self._parts(noise):
            found = sampler(state, **conditions)
            assert isinstance(found, Tensor)
            squares.append((found - exact[part]).square().flatten(1).mean(1))
            if self._distance is not None:
                features.append(self._distance(found, exact[part]))
        figures = {"rmse": torch.cat(squares).mean().sqrt()}
        if features:
            figures["features"] = torch.cat(features).mean()
        numbers = dict(zip(figures, host_numbers(list(figures.values())), strict=True))
        product = numbers["rmse"] * numbers.get("features", 0.0) ** 0.5
        numbers["score"] = product if self._score == "product" else numbers[self._score]
        return numbers

    def _solve(self, noise: Tensor) -> Tensor:
        solve = KeptSolution(self._denoiser, self._steps)
        return torch.cat([solve(state, **self._conditions) for _, state in self._parts(noise)])

    def _parts(self, noise: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Few samples at a time, as in training: 64 of a large model do not fit on its device."""
        for low in range(0, len(noise), _BATCH):
            tell_first_sample(self._denoiser, low)
            part = slice(low, low + _BATCH)
            yield part, noise[part]

"""Where a method that builds on a handcrafted solver begins: at the best one for this model.

No solver and no grid is good on every model, so defaults are measured, not written down. Learners of
tables begin at the best solver of the ranking that they can express; learners of per-sample rows run
each of their own untrained forms. A setting that says where to begin, as a paper's preset has it, is
taken as given and nothing is measured. ``afs`` does not say where to begin: it is kept to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.sampler import Sampler
from ..models.denoiser import Denoiser
from ..processes import Process
from ..solvers.common import afs_kind
from ..solvers.policy import Policy
from ..solvers.registry import Label, parse_label
from .start import ExactSolution, SamplingProblem, find_start, rmse
from .training.noise import tell_first_sample

Say = Callable[[str], None]
Settings = dict[str, Any]

_ROUNDS = ((2, 6), (16, 1))
"""Samples that forms are compared on, and how many stay."""
_FIRST = 1 << 21
"""Number of the first of them, apart from those of proof, training and validation."""


@dataclass(frozen=True)
class BeginAtSolver:
    """For learners of tables.

    Attributes:
        settings: those that say where to begin.
        of: a solver's settings, or None where the learner cannot begin there.
    """

    settings: tuple[str, ...]
    of: Callable[[Label], Settings | None]

    def measured(
        self, problem: SamplingProblem, nfe: int, store: Path | None, say: Say, afs: Any = None
    ) -> Settings:
        """Settings of the best solver of the ranking that has some, with this ``afs`` unless None."""
        # lean: a start, not a claim; and the same in every process of a run
        start, _ = find_start(
            problem, nfe, effort="lean", store=store, say=say, afs=afs is None or bool(afs)
        )
        for found in start.ranking:
            settings = self.of(parse_label(found.candidate.label))
            if settings is None:
                continue
            if afs is None or bool(settings.get("afs")) == (afs_kind(afs) is not None):
                say(f"begins at {found.candidate.label}, RMSE {found.rmse:.4g}")
                return settings
        return {}


@dataclass(frozen=True)
class BeginAtForm:
    """For learners whose rows depend on the sample: their own forms, untrained.

    Attributes:
        settings: those that say where to begin.
        forms: the settings of every form of ``nfe`` evaluations.
        learner: the objective of (denoiser, settings, shape), whose ``policy`` is untrained; it may
            raise ValueError for a form that the process does not have.
        own: its settings, with ``nfe`` and ``bottleneck``.
    """

    settings: tuple[str, ...]
    forms: Callable[[Process, int], Sequence[Settings]]
    learner: Callable[[Denoiser, Any, tuple[int, ...]], Any]
    own: Callable[..., Any]

    def measured(
        self, problem: SamplingProblem, nfe: int, store: Path | None, say: Say, afs: Any = None
    ) -> Settings:
        """The form whose end is nearest to the exact solution; the others are left on the way."""
        made: list[tuple[Settings, Policy]] = []
        for form in self.forms(problem.process, nfe):
            if afs is not None and form.get("afs", afs) != afs:
                continue
            form = form if afs is None else {**form, "afs": afs}
            try:
                own = self.own(nfe=nfe, bottleneck=False, **form)
                policy = self.learner(problem.denoiser, own, problem.shape).policy
            except ValueError:  # times that this form cannot start from or end at
                continue
            made.append((form, policy))
        if not made:
            return {}
        exact = ExactSolution(problem, samples=4)
        proof = exact.prove()
        (first, stay), (second, _) = _ROUNDS
        evaluations = nfe * (len(made) * first + stay * second) + proof.steps * (first + second)
        say(f"start: {len(made)} untrained forms, about {evaluations:,} evaluations of one sample")
        errors: list[float] = []
        for samples, keep in _ROUNDS:
            numbers = range(_FIRST, _FIRST + samples)
            target = exact.solve(numbers)
            errors = [_error(problem, target, policy, numbers) for _, policy in made]
            order = sorted(range(len(made)), key=errors.__getitem__)[:keep]
            made, errors = [made[i] for i in order], [errors[i] for i in order]
        named = ", ".join(f"{key}={value}" for key, value in made[0][0].items())
        say(f"begins at {named}, RMSE {errors[0]:.4g}")
        return made[0][0]


Begin = BeginAtSolver | BeginAtForm


def begun(
    begin: Begin | None,
    problem: SamplingProblem,
    nfe: int,
    given: Mapping[str, Any],
    *,
    store: Path | None = None,
    say: Say = lambda line: None,
) -> Settings:
    """``given`` with the measured start, where the learner has one and ``given`` does not say it.

    Args:
        given: ``afs`` among them is a condition on the start, not the start.
        store: file that keeps the measurement.
    """
    settings = dict(given)
    if begin is None or set(begin.settings) & set(settings):
        return settings
    return {**begin.measured(problem, nfe, store, say, settings.get("afs")), **settings}


@torch.no_grad()
def _error(problem: SamplingProblem, target: Tensor, policy: Policy, numbers: range) -> float:
    """RMSE to ``target`` ``[B, ...]``, their exact solution; infinite where it is not finite."""
    tell_first_sample(problem.denoiser, numbers.start)
    problem.calls += policy.nfe * len(numbers)
    end = Sampler(problem.denoiser, policy)(problem.noise(numbers), **problem.condition(numbers))
    assert isinstance(end, Tensor)
    error = rmse(end, target)
    return error if error == error else float("inf")

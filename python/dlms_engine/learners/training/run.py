"""A learner's run with the shared trainer, from its settings to the solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...policies.distilled import DistilledSolver
from ...solvers.policy import Policy
from ...support.parallel import World
from ..options import RunOptions
from ..settings import plain
from .settings import TrainerSettings
from .trainer import Learner, Trainer


def train_learner(
    learner: Learner,
    method: str,
    own: dict[str, Any],
    training: TrainerSettings,
    shape: tuple[int, ...],
    options: RunOptions,
    trained: Callable[[], Policy],
) -> DistilledSolver:
    """Trains ``learner`` and returns the solver of its best parameters.

    Args:
        method: the learner's name.
        own: its settings, JSON values: with ``training`` they make two runs the same run.
        trained: the policy, called when the best parameters are in place.
    """
    fingerprint = {"method": method, **own, **plain(training), "shape": list(shape)}
    trainer = Trainer(
        learner,
        training,
        shape,
        checkpoint=options.checkpoint,
        fingerprint={**fingerprint, **options.identity},
        world=World.current(),
        monitor=options.monitor,
    )
    state = trainer.run(resume=options.resume, progress=options.progress)
    best = {"score": state.best_score, "set": state.best_set}
    return DistilledSolver(trained(), method, fingerprint, state.history, best)


def training_settings(
    options: RunOptions, given: dict[str, Any], **defaults: Any
) -> TrainerSettings:
    """``given`` over a learner's ``defaults``; ``options.trajectories`` wins over both."""
    shared = {"seed": options.seed, **defaults, **given}
    if options.trajectories is not None:
        shared["trajectories"] = options.trajectories
    return TrainerSettings(**shared)

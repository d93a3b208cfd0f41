"""``distill(method="amed")``: settings in, solver out."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...support.parallel import World
from .. import presets
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import split_settings
from ..training.trainer import Trainer, TrainerSettings
from .objective import Amed
from .settings import AmedSettings

_DEFAULTS: dict[str, Any] = {
    "trajectories": 10_000,
    "batch": 64,
    "clip": 1e30,
    "ema_kimg": (),
}
"""Where AMED differs from ``TrainerSettings``: no clipping to speak of and no averaging."""


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Runs Algorithm 1 of the paper with the shared trainer."""
    own, given = split_settings(options.settings, AmedSettings, TrainerSettings)
    shared = {**_DEFAULTS, **given}
    if options.trajectories is not None:
        shared["trajectories"] = options.trajectories
    settings = AmedSettings(nfe=options.nfe, **own)
    training = TrainerSettings(seed=options.seed, **shared)
    learner = Amed(denoiser, settings, shape, seed=options.seed, **options.cond)
    fingerprint: dict[str, Any] = {
        **learner.fingerprint(),
        **dataclasses.asdict(training),
        "shape": list(shape),
    }
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
    return DistilledSolver(learner.policy, "amed", fingerprint, state.history, best)


AMED = LearnerEntry(
    "amed", _run, AmedSettings, trained=True, defaults=_DEFAULTS, presets=presets.of("amed")
)

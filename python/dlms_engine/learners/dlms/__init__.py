"""``distill(method="dlms")``: settings in, solver out."""

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
from .objective import Dlms
from .settings import DlmsSettings
from .teacher import TeacherSettings


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Runs Algorithm 1 of the paper with the shared trainer."""
    own, shared = split_settings(
        options.settings, DlmsSettings, TrainerSettings, nested={"teacher": TeacherSettings}
    )
    if options.trajectories is not None:
        shared["trajectories"] = options.trajectories
    settings = DlmsSettings(nfe=options.nfe, **own)
    training = TrainerSettings(seed=options.seed, **shared)
    learner = Dlms(
        denoiser,
        settings,
        shape,
        feature_network=options.feature_network,
        seed=options.seed,
        **options.cond,
    )
    learner.world = World.current()
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
    return DistilledSolver(learner.policy, "dlms", fingerprint, state.history, best)


DLMS = LearnerEntry("dlms", _run, DlmsSettings, trained=True, afs=True, presets=presets.of("dlms"))

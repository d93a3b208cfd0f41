"""``distill(method="free_table")``: settings in, table out."""

from __future__ import annotations

from typing import Any

import torch

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...support.parallel import World
from .. import presets
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..training.trainer import Trainer, TrainerSettings
from .objective import FreeTable
from .settings import FreeTableSettings

_DEFAULTS: dict[str, Any] = {"decay": "cosine"}
"""Where the free table differs from ``TrainerSettings``."""


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Trains the table with the shared trainer; ``options.trajectories`` are start noises."""
    own, shared = split_settings(options.settings, FreeTableSettings, TrainerSettings)
    if options.trajectories is not None:
        shared["trajectories"] = options.trajectories
    settings = FreeTableSettings(nfe=options.nfe, **own)
    training = TrainerSettings(**{"seed": options.seed, **_DEFAULTS, **shared})
    learner = FreeTable(
        denoiser, settings, shape, feature_network=options.feature_network, **options.cond
    )
    fingerprint = {
        "method": "free_table",
        **plain(settings),
        **plain(training),
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
    with torch.no_grad():
        table = learner.free().detach()
    best = {"score": state.best_score, "set": state.best_set}
    return DistilledSolver(table, "free_table", fingerprint, state.history, best)


FREE_TABLE = LearnerEntry(
    "free_table",
    _run,
    FreeTableSettings,
    trained=True,
    defaults=_DEFAULTS,
    afs=True,
    presets=presets.of("free_table"),
)

"""``distill(method="free_table")``: settings in, table out."""

from __future__ import annotations

from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...solvers.registry import Label
from .. import presets
from ..begin import BeginAtSolver
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..training.base_table import base_settings
from ..training.conclude import Beside, concluded
from ..training.run import train_learner, training_settings
from ..training.settings import TrainerSettings
from .objective import FreeTable
from .settings import FreeTableSettings

_DEFAULTS: dict[str, Any] = {"decay": "cosine"}
"""Where the free table differs from ``TrainerSettings``."""


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Trains the table with the shared trainer; ``options.trajectories`` are start noises."""
    own, shared = split_settings(options.settings, FreeTableSettings, TrainerSettings)
    settings = FreeTableSettings(nfe=options.nfe, **own)
    training = training_settings(options, shared, **_DEFAULTS)
    learner = FreeTable(
        denoiser, settings, shape, feature_network=options.feature_network, **options.conditions
    )
    solver = train_learner(
        learner,
        "free_table",
        plain(settings),
        training,
        shape,
        options,
        lambda: learner.free().detach(),
    )
    bases = settings.solver.standard(denoiser.process, settings.nfe)
    beside = Beside(bases, keep=settings.keep, most=training.trajectories // 2)
    return concluded(solver, denoiser, shape, options, beside)


def _begin(label: Label) -> dict[str, Any] | None:
    found = base_settings(label)
    return None if found is None else {**found, "grid": label.grid}


FREE_TABLE = LearnerEntry(
    "free_table",
    _run,
    FreeTableSettings,
    trained=True,
    defaults=_DEFAULTS,
    afs=True,
    presets=presets.of("free_table"),
    begin=BeginAtSolver(("base", "order", "variant", "store", "grid"), _begin),
)

"""``distill(method="amed")``: settings in, solver out."""

from __future__ import annotations

from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...processes import Process
from ...solvers.registry import standard_grids
from .. import presets
from ..begin import BeginAtForm
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import split_settings
from ..training.conclude import Beside, concluded
from ..training.run import train_learner, training_settings
from ..training.settings import TrainerSettings
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
    settings = AmedSettings(nfe=options.nfe, **own)
    training = training_settings(options, given, **_DEFAULTS)
    learner = Amed(denoiser, settings, shape, seed=options.seed, **options.conditions)
    solver = train_learner(
        learner, "amed", learner.fingerprint(), training, shape, options, lambda: learner.policy
    )
    beside = Beside(
        settings.handcrafted(denoiser.process),
        lambda noise, conditions: learner.coordinates.carried(
            lambda x: learner.teacher_states(x, **conditions)[-1], noise
        ),
        "more times inside each step (interpolation)",
        settings.keep,
        training.trajectories // 2,
    )
    return concluded(solver, denoiser, shape, options, beside)


def _forms(process: Process, nfe: int) -> list[dict[str, Any]]:
    """AMED-Solver and every solver a plugin drives, on every grid."""
    solvers: list[dict[str, Any]] = [
        {"solver": solver} for solver in ("amed", "ddim", "dpm_solver_2")
    ]
    solvers += [{"solver": "ipndm", "order": order} for order in (2, 3, 4)]
    solvers += [{"solver": "dpm_solver_pp", "order": order} for order in (2, 3)]
    return [{**each, "grid": grid} for each in solvers for grid in standard_grids(process)]


AMED = LearnerEntry(
    "amed",
    _run,
    AmedSettings,
    trained=True,
    defaults=_DEFAULTS,
    afs=True,
    presets=presets.of("amed"),
    begin=BeginAtForm(("solver", "order", "prediction", "grid"), _forms, Amed, AmedSettings),
)

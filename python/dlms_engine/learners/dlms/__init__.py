"""``distill(method="dlms")``: settings in, solver out."""

from __future__ import annotations

from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...processes import Process, RectifiedFlow
from ...solvers.registry import standard_grids
from ...support.parallel import World
from .. import presets
from ..begin import BeginAtForm
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import split_settings
from ..training.conclude import Beside, concluded
from ..training.run import train_learner, training_settings
from ..training.settings import TrainerSettings
from .objective import Dlms
from .settings import DlmsSettings
from .teacher import TeacherSettings


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Runs Algorithm 1 of the paper with the shared trainer."""
    own, shared = split_settings(
        options.settings, DlmsSettings, TrainerSettings, nested={"teacher": TeacherSettings}
    )
    settings = DlmsSettings(nfe=options.nfe, **own)
    training = training_settings(options, shared)
    learner = Dlms(
        denoiser,
        settings,
        shape,
        feature_network=options.feature_network,
        seed=options.seed,
        **options.conditions,
    )
    learner.world = World.current()
    solver = train_learner(
        learner, "dlms", learner.fingerprint(), training, shape, options, lambda: learner.policy
    )
    beside = Beside(
        settings.handcrafted(denoiser.process),
        keep="learned",  # it begins at the best of its forms and keeps the best it has been
        teacher=lambda noise, conditions: learner.coordinates.carried(
            lambda x: learner.teacher_end(x, **conditions), noise
        ),
        finer="more points inside each interval (teacher_interpolation)",
    )
    return concluded(solver, denoiser, shape, options, beside)


def _forms(process: Process, nfe: int) -> list[dict[str, Any]]:
    """Adams-Bashforth, DDIM and, where they exist, the other handcrafted solvers, on every grid."""
    weights: list[dict[str, Any]] = [
        {"prediction": "data", "init": "ab", "order": order} for order in (2, 3, 4)
    ]
    weights += [{"prediction": "data", "init": name} for name in ("ddim", "unipc")]
    if not isinstance(process, RectifiedFlow):  # noise and lambda_ say nothing at alpha = 0
        weights.append({"prediction": "data", "init": "dpm_solver_pp"})
        weights += [{"prediction": "noise", "init": "ipndm", "order": k} for k in (2, 3, 4)]
        weights += [{"prediction": "noise", "init": "deis", "order": k} for k in (3, 4)]
    return [
        {**each, "grid": grid, "afs": afs}
        for each in weights
        for grid in standard_grids(process)
        for afs in (True, False)
    ]


DLMS = LearnerEntry(
    "dlms",
    _run,
    DlmsSettings,
    trained=True,
    afs=True,
    presets=presets.of("dlms"),
    begin=BeginAtForm(("prediction", "init", "order", "grid"), _forms, Dlms, DlmsSettings),
)

"""``distill(method="dlms")``: settings in, solver out."""

from __future__ import annotations

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...support.parallel import World
from .. import presets
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import split_settings
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
        **options.cond,
    )
    learner.world = World.current()
    return train_learner(
        learner, "dlms", learner.fingerprint(), training, shape, options, lambda: learner.policy
    )


DLMS = LearnerEntry("dlms", _run, DlmsSettings, trained=True, afs=True, presets=presets.of("dlms"))

"""What the package knows of a learner: everything that differs from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..models.denoiser import Denoiser
from ..policies.distilled import DistilledSolver
from .begin import Begin
from .options import RunOptions
from .settings import hints
from .training.settings import TrainerSettings

_Run = Callable[[Denoiser, tuple[int, ...], RunOptions], DistilledSolver]
"""(denoiser, shape of one sample, options) -> the distilled solver."""


@dataclasses.dataclass(frozen=True)
class LearnerEntry:
    """One learner. ``distill``, the command line, comparisons, pipelines and files read it.

    Attributes:
        name: what ``distill(method=...)`` and solver files call it.
        run: trains it.
        settings: its settings, a frozen dataclass with a field ``nfe``.
        trained: by the shared trainer: ``TrainerSettings`` are settings too, and more trajectories
            are more training.
        trajectories: the setting that ``distill(trajectories=...)`` stands for; None where the
            number is no setting but an argument of the run.
        samples: its default where it is no setting.
        defaults: where it differs from ``TrainerSettings``.
        afs: whether its solvers may rescale the first network input, as an analytical first step
            does, unless the setting ``afs`` says otherwise.
        presets: name -> settings of a paper or a model, among them ``trajectories``.
        begin: how it finds the solver it begins at; None where it has none or finds it itself.
    """

    name: str
    run: _Run
    settings: type[Any]
    trained: bool = False
    trajectories: str | None = "trajectories"
    samples: int | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    afs: bool = False
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    begin: Begin | None = None

    @property
    def kinds(self) -> list[type[Any]]:
        """The dataclasses its settings are sorted into."""
        return [self.settings, *([TrainerSettings] if self.trained else [])]

    @property
    def nested(self) -> dict[str, type[Any]]:
        """Field -> dataclass, of settings that are dataclasses themselves."""
        return {
            field: hint
            for field, hint in hints(self.settings).items()
            if isinstance(hint, type) and dataclasses.is_dataclass(hint)
        }

"""``distill(method="ld3")``: settings in, table out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...solvers.registry import Label
from ...support.parallel import World
from .. import presets
from ..begin import BeginAtSolver
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..training.base_table import base_settings
from ..training.conclude import Beside, concluded
from .loop import Ld3Loop
from .objective import Ld3
from .settings import Ld3Settings


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Learns a grid and network times; ``options.trajectories`` counts the training noises."""
    (own,) = split_settings(options.settings, Ld3Settings)
    if options.trajectories is not None:
        own["train"] = options.trajectories
    settings = Ld3Settings(nfe=options.nfe, **own)
    learner = Ld3(denoiser, settings, feature_network=options.feature_network, **options.conditions)
    fingerprint = {
        "method": "ld3",
        **plain(settings),
        "loss": learner.kind,
        "seed": options.seed,
        "shape": list(shape),
    }
    loop = Ld3Loop(
        learner,
        shape,
        seed=options.seed,
        checkpoint=options.checkpoint,
        fingerprint={**fingerprint, **options.identity},
        world=World.current(),
        monitor=options.monitor,
    )
    state = loop.run(resume=options.resume, progress=options.progress)
    with torch.no_grad():
        table = learner.table().detach()
    named = {**table.options, "solver": table.name}
    table = dataclasses.replace(table, name="ld3", options=named)
    best = {"score": state.best_score, "set": f"raw@{state.best_update}"}
    solver = DistilledSolver(table, "ld3", fingerprint, state.history, best)
    beside = Beside(
        settings.base.standard(denoiser.process, settings.nfe),
        lambda noise, conditions: learner.targets(noise / learner.sigma_start, **conditions),
        "more evaluations (teacher_nfe)",
        settings.keep,
    )
    return concluded(solver, denoiser, shape, options, beside)


def _begin(label: Label) -> dict[str, Any] | None:
    found = base_settings(label)
    if found is None:
        return None
    student = found.pop("base")
    variant = {"variant": "bh2"} if student == "unipc" else {}  # the solver's own default
    return {"student": student, **variant, **found, "init": label.grid}


LD3 = LearnerEntry(
    "ld3",
    _run,
    Ld3Settings,
    trajectories="train",
    afs=True,
    presets=presets.of("ld3"),
    begin=BeginAtSolver(("student", "order", "variant", "init"), _begin),
)

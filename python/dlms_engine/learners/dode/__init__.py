"""``distill(method="dode")``: settings in, table out."""

from __future__ import annotations

from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...solvers.registry import Label
from ...support.parallel import World
from ...support.values import require_finite
from .. import presets
from ..begin import BeginAtSolver
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..training.conclude import Beside, concluded
from ..training.noise import unit_noise
from .objective import fit, standard_bases, summary, teacher_states
from .settings import HIGHEST, DodeSettings, student_grid


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Fits on one batch; ``options.trajectories`` is its size. Seconds long: nothing to resume."""
    (own,) = split_settings(options.settings, DodeSettings)
    if options.trajectories is not None:
        own["batch"] = options.trajectories
    settings = DodeSettings(nfe=options.nfe, **own)
    world = World.current()
    grid = student_grid(settings, denoiser.process)
    start, stop = world.slice(settings.batch)
    x = unit_noise(options.seed, range(start, stop), shape, denoiser.device)
    x = x * float(denoiser.process.sigma(grid[0]))
    fitted = fit(
        denoiser, settings, x, world=world, progress=options.progress and world.rank == 0,
        **options.conditions,
    )  # fmt: skip
    history = summary(fitted)
    for entry in history:
        require_finite(
            entry["rmse_after"], f"the distance to the target of evaluation {entry['row']}"
        )
    for row, entry in enumerate(history):
        options.monitor.log(row, entry)
    record = {"method": "dode", **plain(settings), "seed": options.seed, "shape": list(shape)}
    best = {"score": history[-1]["rmse_after"], "set": "closed form"}
    solver = DistilledSolver(fitted.table, "dode", record, history, best)
    beside = Beside(
        standard_bases(denoiser.process, settings),
        lambda noise, conditions: teacher_states(
            denoiser, settings, grid, noise, **{**options.conditions, **conditions}
        )[-1],
        "more sub-steps (scale)"
        + (", or alignment='interval'" if settings.alignment == "official" else ""),
        settings.keep,
    )
    return concluded(solver, denoiser, shape, options, beside)


def _begin(label: Label) -> dict[str, Any] | None:
    if label.method not in HIGHEST or label.afs != "off" or not set(label.options) <= {"order"}:
        return None
    return {"solver": label.method, **label.options, "grid": label.grid}


DODE = LearnerEntry(
    "dode",
    _run,
    DodeSettings,
    trajectories="batch",
    presets=presets.of("dode"),
    begin=BeginAtSolver(
        ("solver", "order", "prediction", "first_step", "alignment", "grid"), _begin
    ),
)

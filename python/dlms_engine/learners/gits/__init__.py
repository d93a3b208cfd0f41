"""``distill(method="gits")``: a searched grid, returned as the student's table."""

from __future__ import annotations

from typing import Any

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...solvers.registry import Label, label_of
from ...support.parallel import World
from .. import presets
from ..begin import BeginAtSolver
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
from ..training.conclude import Beside, concluded
from .choice import nearest_to_exact, standard_students
from .objective import Gits
from .settings import GitsSettings

_SAMPLES = 256
"""Warm-up trajectories when ``trajectories`` is not given."""


def _run(denoiser: Denoiser, shape: tuple[int, ...], options: RunOptions) -> DistilledSolver:
    """Searches the grid; minutes at most, so there is no checkpoint to resume."""
    (own,) = split_settings(options.settings, GitsSettings)
    settings = GitsSettings(nfe=options.nfe, **own)
    samples = _SAMPLES if options.trajectories is None else options.trajectories
    search = Gits(
        denoiser,
        settings,
        shape,
        samples,
        seed=options.seed,
        world=World.current(),
        **options.conditions,
    )
    indices, report = search.search()
    for row, entry in enumerate(report["tried"]):
        options.monitor.log(row, {key: entry[key] for key in ("gamma", "rmse")})
    described = {
        "method": "gits",
        **plain(settings),
        "samples": samples,
        "seed": options.seed,
        "shape": list(shape),
    }
    chosen = f"gamma={report['gamma']:g}"
    best: dict[str, Any] = {"score": report["rmse"], "set": chosen, "indices": indices}
    table = search.student(indices)
    if settings.candidates == "all":
        searched = {
            f"gamma={entry['gamma']:g}, {entry['indices']}": search.student(entry["indices"])
            for entry in report["tried"]
        }
        name, table, rows = nearest_to_exact(
            denoiser, shape, searched, settings, seed=options.seed, conditions=options.conditions
        )
        score = next(row["rmse"] for row in rows if row["grid"] == name)
        best = {"score": score, "set": name, "indices": indices, "grids": rows}
    solver = DistilledSolver(table, "gits", described, report["tried"], best)
    beside = Beside(
        {} if settings.candidates == "all" else standard_students(denoiser.process, settings),
        search.teacher_end,
        "more times (points)",
        "learned",
    )
    solver = concluded(solver, denoiser, shape, options, beside)
    if settings.candidates == "all":  # the standard grids are among those it was chosen from
        standard = standard_students(denoiser.process, settings)
        errors = {row["grid"]: row["rmse"] for row in best["grids"] if row["grid"] in standard}
        if errors:
            name = min(errors, key=errors.__getitem__)
            label = label_of(standard[name], name.split("/")[0])
            solver.best["compared"] |= {"base": label}
    return solver


def _begin(label: Label) -> dict[str, Any]:
    options = {**label.options}
    order = options.pop("order", None)
    return {"solver": label.method, "order": order, "options": options, "afs": label.afs != "off"}


GITS = LearnerEntry(
    "gits",
    _run,
    GitsSettings,
    trajectories=None,
    samples=_SAMPLES,
    afs=True,
    presets=presets.of("gits"),
    begin=BeginAtSolver(("solver", "order", "options"), _begin),
)

"""``distill(method="gits")``: a searched grid, returned as the student's table."""

from __future__ import annotations

from ...models.denoiser import Denoiser
from ...policies.distilled import DistilledSolver
from ...support.parallel import World
from .. import presets
from ..entry import LearnerEntry
from ..options import RunOptions
from ..settings import plain, split_settings
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
        denoiser, settings, shape, samples, seed=options.seed, world=World.current(), **options.cond
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
    best = {"score": report["rmse"], "set": f"gamma={report['gamma']:g}", "indices": indices}
    return DistilledSolver(search.student(indices), "gits", described, report["tried"], best)


GITS = LearnerEntry(
    "gits", _run, GitsSettings, trajectories=None, samples=_SAMPLES, presets=presets.of("gits")
)

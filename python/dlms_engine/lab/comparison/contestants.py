"""Who is compared: a learner, its settings, and the handcrafted solver it builds on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...learners.entry import LearnerEntry
from ...learners.registry import LEARNERS, preset
from ...learners.training.settings import TrainerSettings
from ...processes import EDM, Process
from ...solvers.registry import handcrafted_table
from ...solvers.table import SolverTable


@dataclass(frozen=True)
class BuildsOn:
    """The handcrafted solver a learner starts from, at the same number of evaluations.

    Attributes:
        method, grid, order: as for ``dlms sample``.
        afs: "off", "dockhorn", "zero", or "odd": dockhorn where two evaluations a step need it.
    """

    method: str
    grid: str = "polynomial"
    order: int | None = None
    afs: str = "off"

    def table(self, process: Process, nfe: int) -> SolverTable:
        """Its table.

        Raises:
            ValueError: no number of steps gives that nfe.
        """
        afs = ("dockhorn" if nfe % 2 else "off") if self.afs == "odd" else self.afs
        return handcrafted_table(
            process, self.method, nfe, grid=self.grid, order=self.order, afs=afs
        )


@dataclass(frozen=True)
class Contestant:
    """One line of the comparison.

    Attributes:
        label: what it is called, and the stem of its files.
        method: the learner, a key of ``learners.LEARNERS``.
        settings: of the learner, without ``trajectories``.
        base: what it has to beat.
        scales: True when more trajectories are more training; otherwise ``trajectories`` are
            taken as they are, since a closed form or a search does not profit from the rest.
        trajectories: for a learner that does not scale; None is the learner's own default.
        batch: trajectories an update; the probe that measures its cost takes multiples of it.
        budgeted: True for a learner that is given the budget itself and keeps to it.
    """

    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: BuildsOn | None = None
    scales: bool = True
    trajectories: int | None = None
    batch: int = 32
    budgeted: bool = False


IPNDM = BuildsOn("ipndm", order=4, afs="dockhorn")


def _of_preset(label: str, name: str, **changes: Any) -> Contestant:
    held = preset(name)
    held.pop("trajectories", None)
    method = held.pop("method")
    batch = int(held.get("batch", 32))
    return Contestant(label, method, held, batch=batch, **changes)


def _contestants() -> dict[str, Contestant]:
    # AMED takes an analytical first step at odd counts only, two evaluations a step
    dpm_solver_pp = BuildsOn("dpm_solver_pp", "logsnr", 3, "odd")
    ipndm = dataclasses.replace(IPNDM, afs="odd")
    # on iPNDM the search does not beat the rho-7 grid here, on DDIM it does
    searched = {"solver": "ddim", "gamma": [0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15]}
    midpoint = BuildsOn("dpm_solver_2", grid="time_uniform", afs="odd")
    return {
        "auto": Contestant("auto", "auto", scales=False, budgeted=True),
        "dlms": _of_preset("dlms", "dlms-embedded", base=IPNDM),
        "dlms-local": _of_preset("dlms-local", "dlms-embedded-local", base=IPNDM),
        "dlms-literal": _of_preset(
            "dlms-literal",
            "dlms-embedded-literal",
            base=BuildsOn("ipndm", "time_uniform", 4, "dockhorn"),
        ),
        "amed": _of_preset("amed", "amed-embedded", base=midpoint),
        "amed-plugin": _of_preset("amed-plugin", "amed-plugin-embedded", base=dpm_solver_pp),
        "amed-plugin-ipndm": _of_preset(
            "amed-plugin-ipndm", "amed-plugin-ipndm-embedded", base=ipndm
        ),
        "ld3": _of_preset("ld3", "ld3-embedded", base=BuildsOn("unipc", "logsnr", 3)),
        "dode": Contestant(
            "dode", "dode", {"solver": "ddim"}, BuildsOn("ddim"), scales=False, trajectories=256
        ),
        "gits": Contestant(
            "gits", "gits", searched, BuildsOn("ddim"), scales=False, trajectories=96
        ),
        "free_table": _of_preset("free_table", "free-table-embedded", base=IPNDM),
    }


CONTESTANTS = _contestants()
"""name -> contestant, with the settings chosen on the embedded model."""

STANDARD = ("auto", "dlms", "amed", "amed-plugin", "ld3", "dode", "gits", "free_table")
"""Who takes part unless others are named."""


def _local(label: str, **changes: Any) -> Contestant:
    """DLMS with the paper's local objective alone, some settings changed."""
    whole = _of_preset(label, "dlms-embedded-local", base=IPNDM)
    return dataclasses.replace(whole, settings={**whole.settings, **changes})


def _ablations() -> list[Contestant]:
    """Liang et al. 2025, Table 3, on the embedded model's settings of the local algorithm."""

    def without(label: str, **changes: Any) -> Contestant:
        return _local(f"without {label}", **changes)

    return [
        _local("dlms"),
        without("analytical first step", afs=False),
        without("bottleneck", bottleneck=False),
        without("high-order start", init="ddim"),
        # without the distance there is nothing but the RMSE to choose parameters by
        without("feature distance", last_step="pixels", score="rmse"),
        without("time scaling", time_scaling=False),
        without("adaptive times", adaptive_times=False),
    ]


def _interpolations() -> list[Contestant]:
    """Liang et al. 2025, Table 4: M, the teacher's times inside a step."""
    return [_local(f"M = {m}", teacher_interpolation=m) for m in (1, 2, 3, 4)]


STUDIES = {"ablation": _ablations, "interpolation": _interpolations}
"""name -> contestants of one of the paper's tables."""


def choose(
    names: Sequence[str] | None, study: str | None, process: Process | None = None
) -> list[Contestant]:
    """The contestants called ``names`` (``STANDARD`` for None), or of a study.

    Args:
        process: of the model. The settings of ``CONTESTANTS``, their grids and bases first of all, were
            chosen on an EDM model; on another process every learner has its own defaults, which begin
            at the solver that measuring finds.

    Raises:
        ValueError: an unknown name.
    """
    if study is not None:
        if study not in STUDIES:
            raise ValueError(f"study is {study!r}, expected one of {sorted(STUDIES)}")
        return STUDIES[study]()
    plain = {name: _plain(entry) for name, entry in LEARNERS.items()}
    tuned = process is None or isinstance(process, EDM)
    if names is None:
        names = STANDARD if tuned else [name for name in STANDARD if name in plain]
    kept = {name: c for name, c in CONTESTANTS.items() if tuned or name not in plain or c.budgeted}
    known = {**plain, **kept}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"method is {unknown[0]!r}, expected one of {sorted(known)}")
    return [known[name] for name in names]


def _plain(entry: LearnerEntry) -> Contestant:
    """A learner with its own defaults, for which no settings were chosen here."""
    batch = TrainerSettings(**entry.defaults).batch if entry.trained else 1
    return Contestant(
        entry.name, entry.name, scales=entry.trained, trajectories=entry.samples, batch=batch
    )

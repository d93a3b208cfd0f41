"""The handcrafted solver a static learner starts from."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...processes import Process
from ...solvers import make_solver
from ...solvers.common import Afs, afs_kind
from ...solvers.registry import Label, standard_grids
from ...solvers.table import Prediction, SolverTable

BaseName = Literal["euler", "ddim", "ipndm", "ipndm_v", "deis", "dpm_solver_pp", "unipc"]
BASES = ("euler", "ddim", "ipndm", "ipndm_v", "deis", "dpm_solver_pp", "unipc")


@dataclass(frozen=True)
class Base:
    """One evaluation a step, any grid, any network times.

    Attributes:
        solver: one of ``BASES``; "euler" is Euler's method in sigma / alpha, i.e. DDIM with the
            noise prediction (the two differ only where network times are decoupled).
        order: the solver's order; None for its usual one. Not for euler and ddim.
        variant: UniPC's B(h), "bh1" or "bh2".
        afs: analytical first step.
        store: what the history holds; None for the solver's default.
    """

    solver: BaseName = "ipndm"
    order: int | None = None
    variant: Literal["bh1", "bh2"] = "bh2"
    afs: Afs = False
    store: Prediction | None = None

    def __post_init__(self) -> None:
        if self.solver not in BASES:
            raise ValueError(f"solver is {self.solver!r}, expected one of {BASES}")
        if self.order is not None and self.solver in ("euler", "ddim"):
            raise ValueError(
                f"order is {self.order}, but {self.solver} is first order: leave it out"
            )
        afs_kind(self.afs)

    def steps(self, nfe: int) -> int:
        """Solver steps of ``nfe`` evaluations."""
        return nfe + int(afs_kind(self.afs) is not None)

    def table(
        self, process: Process, grid: Tensor, network_times: Tensor | None = None
    ) -> SolverTable:
        """The table on ``grid`` ``[steps + 1]``, differentiable in both arguments."""
        name, options = str(self.solver), dict[str, Any]()
        if name == "euler":
            # without a noise prediction at alpha = 0, the data form is the same step
            blind = bool((process.alpha(grid.detach()[..., 0]) == 0).any())
            name, options["prediction"] = "ddim", "data" if blind else "noise"
        if self.order is not None:
            options["order"] = self.order
        if name == "unipc":
            options["variant"] = self.variant
        return make_solver(
            name,
            process,
            grid.to(torch.float64),
            afs=self.afs,
            network_times=network_times,
            store=self.store,
            **options,
        )

    def standard(self, process: Process, nfe: int) -> dict[str, SolverTable]:
        """Its tables on every standard grid where it exists, by name."""
        found = {}
        for name, grid in standard_grids(process).items():
            with contextlib.suppress(ValueError):  # a grid that starts or ends where it cannot
                found[name] = self.table(process, grid(process, self.steps(nfe)))
        return found


def base_settings(label: Label) -> dict[str, Any] | None:
    """The fields of the ``Base`` that makes the solver of ``label``; None where none does."""
    if label.method not in BASES or not set(label.options) <= {"order", "variant"}:
        return None
    afs = False if label.afs == "off" else label.afs
    return {"base": label.method, **label.options, "afs": afs}

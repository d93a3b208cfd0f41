"""Settings of DLMS; each ablation of the paper's Table 3 is one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...processes import Process
from ...solvers.table import SolverTable
from ..training.coerce import check_choices, check_least
from ..training.conclude import standard_tables
from ..training.coordinates import CoordinatesName
from ..training.start_times import GridSource
from .teacher import TeacherSettings

Init = Literal["ab", "ddim", "deis", "dpm_solver_pp", "ipndm", "unipc"]
_COMBINES = {"dpm_solver_pp": "data", "unipc": "data", "deis": "noise", "ipndm": "noise"}
"""init -> the predictions whose rows it is exact for."""


@dataclass(frozen=True)
class DlmsSettings:
    """Settings of DLMS; each ablation of the paper's Table 3 is one of them.

    Attributes:
        nfe: network evaluations of the distilled sampler.
        order: p, outputs combined at most; None takes 4 for data and the whole past for noise.
        prediction: "data" (the paper) or "noise" (rows over noise predictions).
        init: weights at the start: "ab" (Adams-Bashforth on whatever is combined, the paper's PLMS;
            on noise predictions this is iPNDM exactly), "ddim" (ablation: no high-order
            initialisation), "dpm_solver_pp" and "unipc" (data only; UniPC with its corrector, of
            order p - 1 at most 3), "ipndm" and "deis" (exact iPNDM and tAB-DEIS, noise only).
        grid: times at the start: "time_uniform", "time_quadratic", "polynomial", "logsnr", explicit
            times, a table, or the solver file of LD3, GITS or another learner with a table. With
            ``time_scaling`` its network times are the scalings at the start.
        afs: analytical first step (ablation: False).
        bottleneck: the designer reads the network's bottleneck (ablation: False).
        adaptive_times: times are learned (ablation: False).
        time_scaling: the network's time is scaled (ablation: False).
        time_range, scale_range: bounds, see ``DesignerSettings``.
        coordinates: "edm" works on x / alpha at levels sigma / alpha, as the paper: a network that is
            called at a scaled level has its input rescaled with it; "process" works in the process's
            own time and leaves the input as it is; None is "edm" except for flows, whose level is
            infinite at t = 1, and for a ``grid`` with network times, which were learned so.
        teacher: the many-step teacher.
        last_step: distance of the last step, *instead of* pixels: "pixels" (ablation: w/o
            Inception), "bottleneck" (the network's own bottleneck at ``feature_sigma``: needs no
            other network) or "features" (``feature_network``, e.g. Inception or the embedded one).
        feature_sigma: noise level at which the bottleneck of a finished sample is read.
        endpoint_share: fraction of the updates, the last ones, that train on the end of the whole run
            instead (not in the paper, see ``dlms.objective.endpoint_loss``); 0 is Algorithm 1.
        endpoint_steps: evaluations of the exact solution in that phase.
        last_step_weight: factor of the last step's distance.
        detach_features: the features are data for the designer, not a path for gradients.
        time_gain: less than 1 lets times and scalings move slower than the weights.
        validation_samples, validation_steps: fixed set and the evaluations of its exact solution.
        score: what chooses among the parameter sets, "rmse", "features" or "product" of both.
    """

    nfe: int = 5
    order: int | None = None
    prediction: Literal["data", "noise"] = "data"
    init: Init = "ab"
    grid: GridSource = "time_uniform"
    afs: bool = True
    bottleneck: bool = True
    adaptive_times: bool = True
    time_scaling: bool = True
    time_range: float = 0.7
    scale_range: float = 0.2
    coordinates: CoordinatesName | None = None
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    last_step: Literal["pixels", "bottleneck", "features"] = "pixels"
    feature_sigma: float = 0.1
    endpoint_share: float = 0.85
    endpoint_steps: int = 24
    last_step_weight: float = 1.0
    detach_features: bool = True
    time_gain: float = 1.0
    validation_samples: int = 64
    validation_steps: int = 48
    score: Literal["rmse", "features", "product"] = "rmse"

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
            self, nfe=1, order=1, endpoint_steps=1, validation_samples=1, validation_steps=1,
            time_range=0, scale_range=0, time_gain=0, last_step_weight=0,
        )  # fmt: skip
        if not 0.0 <= self.endpoint_share <= 1.0:
            raise ValueError(f"endpoint_share is {self.endpoint_share}, expected 0 to 1")
        combines = _COMBINES.get(self.init, self.prediction)
        if combines != self.prediction:
            raise ValueError(
                f"init={self.init!r} is exact in {combines} form only and prediction is "
                f"{self.prediction!r}: set prediction={combines!r}, or init='ab' for "
                "Adams-Bashforth weights on either"
            )
        if self.init == "unipc" and self.resolved_order < 2:
            raise ValueError(
                f"init is 'unipc' and order is {self.resolved_order}: its corrector reads two "
                "outputs, set order=2 or more, or init='ddim'"
            )

    @property
    def steps(self) -> int:
        return self.nfe + int(self.afs)

    def handcrafted(self, process: Process) -> dict[str, SolverTable]:
        """The solver whose weights it begins with, iPNDM for Adams-Bashforth, on the standard grids."""
        name = "ipndm" if self.init == "ab" else self.init
        order = {} if name == "ddim" else {"order": self.solver_order}
        return standard_tables(process, name, self.nfe, order, (self.afs,))

    @property
    def solver_order(self) -> int:
        """Order of the solver whose weights it begins with, as far as ``order`` outputs allow.

        UniPC's corrected state is eliminated from its rows, which reaches one output further back
        than its order.
        """
        if self.init == "unipc":
            return min(3, self.resolved_order - 1)
        return min(3 if self.init == "dpm_solver_pp" else 4, self.resolved_order)

    @property
    def resolved_order(self) -> int:
        whole = self.steps if self.prediction == "noise" else min(4, self.steps)
        return whole if self.order is None else min(self.order, self.steps)

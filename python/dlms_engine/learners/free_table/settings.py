"""Settings of the free table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...solvers.common import Afs
from ...solvers.table import Prediction
from ..training.base_table import Base, BaseName
from ..training.coerce import check_choices, check_least
from ..training.conclude import Keep
from ..training.start_times import GridSource


@dataclass(frozen=True)
class FreeTableSettings:
    """Settings of the free table.

    Attributes:
        nfe: network evaluations.
        base: handcrafted solver whose closed form is corrected.
        order: its order; None for its usual one.
        variant: UniPC's B(h).
        afs: analytical first step.
        store: what rows combine, "data" or "noise"; None for the base's own.
        grid: initial times, None for polynomial (uniform in time on flows), a name, times, or another
            learner's solver file (LD3, GITS, ...), whose
            network times are taken too.
        depth: outputs a row may combine; None for all of them (full lower triangle).
        window: largest offset of a network time as a share of the smallest gap.
        learn_times, learn_network_times, learn_weights, learn_state: what is trained: the grid,
            the decoupled times, the weights of outputs, the weights of the state.
        sum_to_base: corrections of a row's output weights add up to zero.
        times_lr, network_times_lr, weights_lr: factors of the learning rate; a weight's correction
            acts on the whole image at once, a step in log time does not.
        loss: "endpoint" against the exact solution, the sum of the logarithms of the mean squared
            pixel and feature distances; or "trajectory": the end and every state on the way,
            against a teacher on the student's own grid.
        last_step: distance of the endpoint: "pixels", "bottleneck" or "features".
        last_step_weight: its factor ("trajectory").
        feature_sigma: noise level of "bottleneck".
        teacher_steps: evaluations of the exact solution ("endpoint").
        interpolation: teacher's points inside each interval ("trajectory").
        validation_samples, validation_steps: fixed set and the evaluations of its exact solution.
        score: what chooses among the parameter sets, "rmse", "features" or "product".
        keep: "best" of what was learned and the base on every standard grid; "learned" in any case.
    """

    nfe: int = 5
    base: BaseName = "ipndm"
    order: int | None = None
    variant: Literal["bh1", "bh2"] = "bh2"
    afs: Afs = "dockhorn"
    store: Prediction | None = None
    grid: GridSource | None = None
    depth: int | None = None
    window: float = 0.5
    learn_times: bool = True
    learn_network_times: bool = True
    learn_weights: bool = True
    learn_state: bool = True
    sum_to_base: bool = False
    times_lr: float = 4.0
    network_times_lr: float = 4.0
    weights_lr: float = 0.2
    loss: Literal["endpoint", "trajectory"] = "endpoint"
    last_step: Literal["pixels", "bottleneck", "features"] = "pixels"
    last_step_weight: float = 1.0
    feature_sigma: float = 0.1
    teacher_steps: int = 24
    interpolation: int = 4
    validation_samples: int = 64
    validation_steps: int = 48
    score: Literal["rmse", "features", "product"] = "rmse"
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
            self, nfe=1, depth=1, teacher_steps=1, interpolation=0, validation_samples=1,
            validation_steps=1, times_lr=0, network_times_lr=0, weights_lr=0, last_step_weight=0,
        )  # fmt: skip
        trained = (self.learn_times, self.learn_network_times, self.learn_weights, self.learn_state)
        if not any(trained):
            raise ValueError("nothing is learned: set one of the learn_... settings")
        self.solver.steps(self.nfe)

    @property
    def solver(self) -> Base:
        """The base solver."""
        return Base(self.base, self.order, self.variant, self.afs, self.store)

    @property
    def steps(self) -> int:
        return self.solver.steps(self.nfe)

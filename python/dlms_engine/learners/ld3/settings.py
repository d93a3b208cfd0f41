"""Settings of LD3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...solvers.common import Afs
from ..training.base_table import Base, BaseName
from ..training.coerce import check_choices, check_least
from ..training.conclude import Keep
from ..training.losses import SampleLoss
from ..training.start_times import GridSource
from .grid import Coordinate


@dataclass(frozen=True)
class Ld3Settings:
    """Settings of LD3; the defaults are the published ones for pixel models, but for two.

    With the published ``lr_times_share=0.1`` and ``rounds_times=5`` network times hardly move on losses
    other than LPIPS; with 1 and 15 they do, and their share of the gain is what the paper reports.

    Latent models in the paper: ``coordinate="time"``, ``order=2``, ``variant="bh2"``, ``lr=0.001``,
    ``lr_times_share=0.001``, ``batch=1``, ``teacher_grid="time_uniform"`` (the ld3 presets).

    Attributes:
        nfe: network evaluations of the student.
        student: "unipc", "dpm_solver_pp", "ipndm", "euler" (or any other of ``base_table.BASES``).
        order: order of the student; None for 3 (euler, ddim: 1).
        variant: UniPC's B(h).
        afs: analytical first step (not in the paper).
        init: initial grid: a name, times, or another learner's solver file; "uniform" is uniform in
            ``coordinate``, "best" the handcrafted one with the least loss on the validation set.
        coordinate: what steps and offsets are measured in, "lambda" or "time"; None for lambda
            where it is finite.
        decouple: learn network times (in the second phase).
        window: largest offset of a network time as a share of the smallest gap of the grid.
        gamma: the ball's radius is gamma * d / N^2 in unit-noise coordinates, d numbers a sample.
        radius: the radius itself; 0 is the hard objective; None for the rule with ``gamma``.
        rounds, rounds_times: rounds without and with network times.
        train, validation: number of start noises.
        batch: mini-batch of both.
        lr, momentum: RMSprop on the step sizes.
        lr_times, lr_noise: SGD on network times and on start noises; None for ``lr_times_share`` / N
            and 12 / N.
        lr_floor, lr_times_floor: decay stops there.
        decay, patience: the rates fall by ``decay`` when validation failed to improve that often.
        clip: largest gradient norm, for step sizes and network times separately.
        stop_at_floor: decays with the network times' rate at its floor before stopping early.
        teacher, teacher_nfe, teacher_order, teacher_grid: the teacher.
        loss: "lpips" (needs ``lpips_weights``), "features", "bottleneck", "l2", "l1", "auto" (the
            first of these that is available) or a callable (student, target) -> ``[B]``.
        lpips_weights: safetensors file for "lpips".
        feature_sigma: noise level of "bottleneck".
        loss_scale: factor on the loss; None for 1 with lpips, and otherwise for what makes the
            first validation loss 0.25, LPIPS's size: the rates of the plain SGDs are meant for it.
        whole: validate on the whole set from the start, not on its first mini-batch until patience
            first runs out.
        checkpoint_seconds: seconds between checkpoints.
        keep: "best" of the learned times and every standard grid, by the end's distance to the exact
            solution; "learned" in any case (the presets).
    """

    nfe: int = 5
    student: BaseName = "unipc"
    order: int | None = None
    variant: Literal["bh1", "bh2"] = "bh1"
    afs: Afs = False
    init: GridSource = "uniform"
    coordinate: Coordinate | None = None
    decouple: bool = True
    window: float = 0.5
    gamma: float = 0.001
    radius: float | None = None
    rounds: int = 2
    rounds_times: int = 15
    train: int = 50
    validation: int = 50
    batch: int = 2
    lr: float = 5e-3
    momentum: float = 0.9
    lr_times: float | None = None
    lr_times_share: float = 1.0
    lr_noise: float | None = None
    lr_floor: float = 5e-5
    lr_times_floor: float = 1e-6
    decay: float = 0.8
    patience: int = 5
    clip: float = 1.0
    stop_at_floor: int = 5
    teacher: str = "unipc"
    teacher_nfe: int = 20
    teacher_order: int | None = 3
    teacher_grid: GridSource = "logsnr"
    loss: str | SampleLoss = "auto"
    lpips_weights: str | None = None
    feature_sigma: float = 0.1
    loss_scale: float | None = None
    whole: bool = False
    checkpoint_seconds: float = 60.0
    keep: Keep = "best"

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, nfe=1, train=1, validation=1, batch=1, teacher_nfe=1, patience=1)
        check_least(self, gamma=0, radius=0, momentum=0, lr_times=0, lr_times_share=0, lr_noise=0)
        for name in ("lr", "clip", "decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.decay > 1:
            raise ValueError(f"decay is {self.decay}, expected at most 1")
        if self.rounds < 0 or self.rounds_times < 0 or self.total_rounds < 1:
            raise ValueError(
                f"rounds is {self.rounds}, rounds_times is {self.rounds_times}, expected at least "
                "one round in all"
            )
        if self.base.steps(self.nfe) < 2:
            raise ValueError("nfe is 1: a grid of one step has nothing to learn")

    @property
    def base(self) -> Base:
        """The student's solver."""
        first_order = self.student in ("euler", "ddim")
        order = None if first_order else (3 if self.order is None else self.order)
        return Base(self.student, order, self.variant, self.afs)

    @property
    def steps(self) -> int:
        return self.base.steps(self.nfe)

    @property
    def total_rounds(self) -> int:
        return self.rounds + self.rounds_times

    def ball(self, numbers: int) -> float:
        """Radius in unit-noise coordinates for samples of ``numbers`` numbers."""
        return self.gamma * numbers / self.steps**2 if self.radius is None else self.radius

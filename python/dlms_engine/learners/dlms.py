"""DLMS: linear multistep solver distillation (Liang et al., ICLR 2025, Algorithm 1).

Each iteration of the inner loop re-predicts the last step from two steps back, so that the weights
of two steps, the time between them and its scaling get gradients through exactly one network
evaluation. Everything older is detached: memory does not grow with the number of evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..denoiser import Denoiser, per_sample
from ..designer import (
    Designer,
    DesignerPolicy,
    DesignerSettings,
    TimeCoordinate,
    step_coefficients,
)
from ..parallel import World
from ..sampler import Sampler
from .coerce import check_choices
from .endpoint import endpoint_loss, endpoint_numbers
from .grid_tools import GridSource, start_times
from .initial import GRIDS, initial_scales, initial_weights
from .losses import FeatureDistance, last_step_distance
from .static import static_table
from .teacher import Teacher, TeacherSettings
from .validation import Validation

Init = Literal["ab", "ddim", "dpm_solver_pp", "ipndm"]


@dataclass(frozen=True)
class DlmsSettings:
    """Settings of DLMS; each ablation of the paper's Table 3 is one of them.

    Attributes:
        nfe: network evaluations of the distilled sampler.
        order: p, outputs combined at most; None takes 4 for data and the whole past for noise.
        prediction: "data" (the paper) or "noise" (rows over noise predictions).
        init: weights at the start: "ab" (Adams-Bashforth on whatever is combined, the paper's PLMS;
            on noise predictions this is iPNDM exactly), "ddim" (ablation: no high-order
            initialisation), "dpm_solver_pp" (data only), "ipndm" (exact iPNDM, noise only).
        grid: times at the start: "time_uniform", "time_quadratic", "polynomial", "logsnr", explicit
            times, a table, or the solver file of LD3, GITS or another learner with a table. With
            ``time_scaling`` its network times are the scalings at the start.
        afs: analytical first step (ablation: False).
        bottleneck: the designer reads the network's bottleneck (ablation: False).
        adaptive_times: times are learned (ablation: False).
        time_scaling: the network's time is scaled (ablation: False).
        time_range, scale_range: bounds, see ``DesignerSettings``.
        teacher: the many-step teacher.
        last_step: distance of the last step, *instead of* pixels: "pixels" (ablation: w/o
            Inception), "bottleneck" (the network's own bottleneck at ``feature_sigma``: needs no
            other network) or "features" (``feature_network``, e.g. Inception or the embedded one).
        feature_sigma: noise level at which the bottleneck of a finished sample is read.
        endpoint_share: fraction of the updates, the last ones, that train on the end of the whole run
            instead (not in the paper, see ``endpoint``); 0 is Algorithm 1.
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
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    last_step: Literal["pixels", "bottleneck", "features"] = "pixels"
    feature_sigma: float = 0.1
    endpoint_share: float = 0.0
    endpoint_steps: int = 24
    last_step_weight: float = 1.0
    detach_features: bool = True
    time_gain: float = 1.0
    validation_samples: int = 64
    validation_steps: int = 48
    score: Literal["rmse", "features", "product"] = "rmse"

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}, expected at least 1")
        check_choices(self)
        if not 0.0 <= self.endpoint_share <= 1.0:
            raise ValueError(f"endpoint_share is {self.endpoint_share}, expected 0 to 1")
        if self.init == "ipndm" and self.prediction != "noise":
            raise ValueError(
                "init='ipndm' is exact in noise form only: set prediction='noise', or init='ab' "
                "for Adams-Bashforth weights on data predictions"
            )
        if self.init == "dpm_solver_pp" and self.prediction != "data":
            raise ValueError("init='dpm_solver_pp' combines data: set prediction='data'")

    @property
    def steps(self) -> int:
        return self.nfe + int(self.afs)

    @property
    def resolved_order(self) -> int:
        whole = self.steps if self.prediction == "noise" else min(4, self.steps)
        return whole if self.order is None else min(self.order, self.steps)


@dataclass
class _Carry:
    """What crosses from one n to the next; everything detached."""

    x: Tensor  # [B, ...] state at t_{n-2}
    t: Tensor  # [B] t_{n-2}
    features: Tensor | None  # [B, F] of the evaluation at t_{n-2}; None is the zero vector of AFS
    queue: list[Tensor]  # newest first


class Dlms:
    """The DLMS objective over a designer network."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: DlmsSettings,
        shape: tuple[int, ...],
        *,
        feature_network: torch.nn.Module | None = None,
        seed: int = 0,
        **cond: Any,
    ) -> None:
        if settings.bottleneck and denoiser.features is None:
            raise ValueError(
                "DLMS reads the network's bottleneck: construct the Denoiser with "
                "features='mid_block' (a module path), or set bottleneck=False"
            )
        self.denoiser = denoiser
        self.settings = settings
        self.cond = cond
        self.world = World()  # ranks that share a batch
        self.progress = 0.0  # share of the run that is done, set by the trainer
        process = denoiser.process
        times = start_times(process, settings.grid, settings.steps)
        grid = times.grid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = Designer(
                self._designer_settings(grid),
                process,
                grid,
                initial_weights(process, grid, settings),
            )
        if times.network is not None and settings.time_scaling:
            with torch.no_grad():
                raw = initial_scales(times, settings.scale_range, settings.time_gain)
                self.module.bias[:, -1] = raw
        self.policy = DesignerPolicy(self.module)
        self.distance: FeatureDistance | None = last_step_distance(
            denoiser, settings.last_step, settings.feature_sigma, feature_network
        )
        self._validation = Validation(
            denoiser,
            shape,
            settings.validation_samples,
            settings.validation_steps,
            self.distance,
            settings.score,
            cond,
        )

    def _designer_settings(self, grid: Tensor) -> DesignerSettings:
        s = self.settings
        coordinate: TimeCoordinate = (
            "log" if float(grid[-1]) > 0 and float(grid[0]) > 1 else "linear"
        )
        return DesignerSettings(
            steps=s.steps,
            order=s.resolved_order,
            afs=s.afs,
            prediction=s.prediction,
            features=64 if s.bottleneck else 0,
            time_range=s.time_range if s.adaptive_times else 0.0,
            scale_range=s.scale_range if s.time_scaling else 0.0,
            coordinate=coordinate,
            time_gain=s.time_gain,
        )

    # -- learner protocol ---------------------------------------------------------------------

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": lr}]

    def iteration(self, noise: Tensor) -> Iterator[dict[str, float]]:
        """One batch of trajectories: accumulates the gradients of L_2 .. L_N, then yields."""
        settings = self.settings
        x = noise * float(self.denoiser.process.sigma(self.module.grid[0]))
        t = self.module.grid[0].expand(x.shape[0])
        carry = self.first(x, t)
        if self.progress >= 1 - settings.endpoint_share:
            loss = endpoint_loss(self, x)
            loss.backward()
            yield endpoint_numbers(loss)
            return
        teacher = Teacher(self.denoiser, settings.teacher, x, settings.steps, self.cond)
        losses: dict[str, float] = {}
        for n in range(2, settings.steps + 1):
            loss, carry = self._pair(n, carry, teacher)
            loss.backward()
            losses[f"loss{n}"] = float(loss.detach())
        yield {"loss": losses[f"loss{settings.steps}"], **losses} if losses else {"loss": 0.0}

    def validate(self) -> dict[str, float]:
        return self._validation.measure(Sampler(self.denoiser, self.policy), self.cond)

    def describe(self) -> dict[str, Any]:
        noise, _ = self._validation.pair()
        table = static_table(self.policy, self.denoiser, noise[:16], **self.cond)
        return {"grid": table.grid.tolist(), "network_times": table.times.tolist()}

    def fingerprint(self) -> dict[str, Any]:
        settings = asdict(replace(self.settings, grid=""))
        source = self.settings.grid  # a file may change: what counts is what was read from it
        named = isinstance(source, str) and source in GRIDS
        settings["grid"] = source if named else self.module.grid.tolist()
        return {"method": "dlms", **settings}

    # -- Algorithm 1 --------------------------------------------------------------------------

    @torch.no_grad()
    def first(self, x: Tensor, t: Tensor) -> _Carry:
        """The first output: the analytic one (data prediction 0) or an evaluation at t_0."""
        if not self.settings.afs:
            output = self.predict(x, t)
            return _Carry(x, t, self.features(), [output])
        if self.settings.prediction == "data":
            return _Carry(x, t, None, [torch.zeros_like(x)])
        return _Carry(x, t, None, [x / per_sample(self.denoiser.process.sigma(t), x)])

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.settings.prediction, **self.cond)

    def features(self) -> Tensor | None:
        if not self.settings.bottleneck:
            return None
        features = self.denoiser.last_features
        return features.detach() if self.settings.detach_features else features

    def advance(
        self, x: Tensor, t: Tensor, t_next: Tensor, weights: Tensor, queue: list[Tensor]
    ) -> Tensor:
        a, c = step_coefficients(self.denoiser.process, self.settings.prediction, t, t_next)
        x = per_sample(a, x) * x
        for k in range(weights.shape[1]):
            x = x + per_sample(c * weights[:, k], x) * queue[k]
        return x

    def _pair(self, n: int, carry: _Carry, teacher: Teacher) -> tuple[Tensor, _Carry]:
        """Steps n-1 and n with gradients, the teacher's segments, L_n and the detached carry."""
        settings = self.settings
        before = self.module(carry.features, carry.t, n - 1)
        t1 = before.time
        x1 = self.advance(carry.x, carry.t, t1, before.weights, carry.queue)
        output = self.predict(x1, before.network_time)
        features = self.features()
        queue = [output, *carry.queue][: settings.resolved_order]
        after = self.module(features, t1.detach(), n)
        t2 = after.time.detach()
        x2 = self.advance(x1, t1, t2, after.weights, queue)
        if n == 2:
            teacher.advance(carry.t, t1.detach())
        target = teacher.advance(t1.detach(), t2)
        if n == settings.steps and self.distance is not None:
            loss = settings.last_step_weight * self.distance(x2, target).mean()
        else:
            loss = (x2 - target).square().flatten(1).sum(1).mean()
        kept = features.detach() if features is not None else None
        return loss, _Carry(x1.detach(), t1.detach(), kept, [q.detach() for q in queue])

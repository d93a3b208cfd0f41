"""DLMS: linear multistep solver distillation (Liang et al., ICLR 2025, Algorithm 1).

Each iteration of the inner loop re-predicts the last step from two steps back, so that the weights
of two steps, the time between them and its scaling get gradients through exactly one network
evaluation. Everything older is detached: memory does not grow with the number of evaluations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...engine.captured_calls import recomputed
from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser, per_sample
from ...policies.dlms import (
    Designer,
    DesignerPolicy,
    DesignerSettings,
    TimeCoordinate,
    step_coefficients,
)
from ...policies.static_table import average_table
from ...processes.grids import GRIDS
from ...support.parallel import World
from ..training.bottleneck import feature_size, reads_bottleneck
from ..training.coordinates import Coordinates
from ..training.learner import Numbers
from ..training.losses import FeatureDistance, last_step_distance, log_distance
from ..training.start_times import StartTimes, start_times
from ..training.validation import Validation
from .initial import initial_scales, initial_weights
from .settings import DlmsSettings
from .teacher import Teacher


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
        **conditions: Any,
    ) -> None:
        reads = reads_bottleneck(denoiser, settings.bottleneck, "dlms")
        settings = replace(settings, bottleneck=reads)
        times = start_times(denoiser.process, settings.grid, settings.steps)
        named = settings.coordinates
        if named is None and times.network is not None:
            named = "process"  # its network times were learned on inputs as they are
        self.coordinates = Coordinates.of(denoiser, named)
        model, self.denoiser = denoiser, self.coordinates.denoiser
        denoiser = self.denoiser
        network = None if times.network is None else self.coordinates.times(times.network)
        times = StartTimes(self.coordinates.times(times.grid), network)
        self.settings = settings
        self.conditions = conditions
        self.world = World()  # ranks that share a batch
        self.progress = 0.0  # share of the run that is done, set by the trainer
        process = denoiser.process
        grid = times.grid
        size = feature_size(denoiser, shape, float(grid[0]), conditions) if reads else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = Designer(
                self._designer_settings(grid, size),
                process,
                grid,
                initial_weights(process, grid, settings),
            )
        if times.network is not None and settings.time_scaling:
            with torch.no_grad():
                raw = initial_scales(times, settings.scale_range, settings.time_gain)
                self.module.bias[:, -1] = raw
        if settings.prediction == "noise" and float(process.alpha(grid[0])) == 0:
            raise ValueError(
                f"prediction is 'noise' and alpha is 0 at t = {float(grid[0])}, where noise predictions "
                "say nothing: use prediction='data', or a process that starts at t_max=0.999"
            )
        self._start = float(process.sigma(grid[0]))
        self.policy = self.coordinates.policy(DesignerPolicy(self.module))
        self.module.to(denoiser.device)
        self.distance: FeatureDistance | None = last_step_distance(
            denoiser, settings.last_step, settings.feature_sigma, feature_network
        )
        self._validation = Validation(
            model,
            shape,
            settings.validation_samples,
            settings.validation_steps,
            self.distance,
            settings.score,
            conditions,
        )

    def _designer_settings(self, grid: Tensor, features: int) -> DesignerSettings:
        s = self.settings
        coordinate: TimeCoordinate = (
            "log" if float(grid[-1]) > 0 and float(grid[0]) > 1 else "linear"
        )
        return DesignerSettings(
            steps=s.steps,
            order=s.resolved_order,
            afs=s.afs,
            prediction=s.prediction,
            features=features,
            time_range=s.time_range if s.adaptive_times else 0.0,
            scale_range=s.scale_range if s.time_scaling else 0.0,
            coordinate=coordinate,
            time_gain=s.time_gain,
        )

    # -- learner protocol ---------------------------------------------------------------------

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": lr}]

    def iteration(self, noise: Tensor) -> Iterator[Numbers]:
        """One batch of trajectories: accumulates the gradients of L_2 .. L_N, then yields."""
        settings = self.settings
        x = noise * self._start
        t = self.module.grid[0].expand(x.shape[0])
        carry = self.first(x, t)
        if self.progress >= 1 - settings.endpoint_share:
            loss = endpoint_loss(self, x)
            loss.backward()
            yield endpoint_numbers(loss)
            return
        teacher = Teacher(self.denoiser, settings.teacher, x, settings.steps, self.conditions)
        losses: Numbers = {}
        for n in range(2, settings.steps + 1):
            loss, carry = self._pair(n, carry, teacher)
            loss.backward()
            losses[f"loss{n}"] = loss.detach()
        last = losses.get(
            f"loss{settings.steps}", torch.zeros((), dtype=torch.float32, device="cpu")
        )
        yield {"loss": last, **losses}

    def validate(self) -> dict[str, float]:
        return self._validation.measure(
            Sampler(self.coordinates.model, self.policy), self.conditions
        )

    def describe(self) -> dict[str, Any]:
        noise, _ = self._validation.pair()
        table = average_table(self.policy, self.coordinates.model, noise[:16], **self.conditions)
        return {"grid": table.grid.tolist(), "network_times": table.times.tolist()}

    def fingerprint(self) -> dict[str, Any]:
        settings = asdict(replace(self.settings, grid=""))
        source = self.settings.grid  # a file may change: what counts is what was read from it
        named = isinstance(source, str) and source in GRIDS
        settings["grid"] = source if named else self.module.grid.tolist()
        return settings

    def teacher_end(self, x: Tensor, **conditions: Any) -> Tensor:
        """End of the teacher on the initial grid from ``x`` ``[B, ...]`` at its start."""
        s, conditions = self.settings, {**self.conditions, **conditions}
        teacher = Teacher(self.denoiser, s.teacher, x, s.steps, conditions)
        for here, there in itertools.pairwise(self.module.grid.expand(x.shape[0], -1).unbind(1)):
            teacher.advance(here, there)
        return teacher.x

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
        return self.denoiser.predict(x, t, self.settings.prediction, **self.conditions)

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


# -- the endpoint phase ---------------------------------------------------------------------------
#
# Not in the paper. Algorithm 1 charges each step for its own error only, and pulls times down where
# nothing charges for what that does later (docs/learners/dlms.md); a short phase on the end itself
# repairs this. Network evaluations are recomputed in backward: one network graph is alive at a time.


def endpoint_loss(learner: Dlms, x: Tensor) -> Tensor:
    """Distance of the student's end to the exact one from the same start ``x`` ``[B, ...]``.

    With a feature distance the loss is the sum of the logarithms of the mean squared pixel and
    feature distances: their product, free of scales, is what validation scores by.
    """
    settings = learner.settings
    target = learner.coordinates.exact_solution(x, settings.endpoint_steps, learner.conditions)
    return log_distance(student_end(learner, x), target, learner.distance, learner.world)


def student_end(learner: Dlms, x: Tensor) -> Tensor:
    """The student's end with the graph of every design; the features stay data, as in training."""
    settings = learner.settings
    t = learner.module.grid[0].expand(x.shape[0])
    carry = learner.first(x, t)
    queue, features = carry.queue, carry.features

    for n in range(1, settings.steps + 1):
        design = learner.module(features, t, n)
        x = learner.advance(x, t, design.time, design.weights, queue)
        t = design.time
        if n < settings.steps:
            output = recomputed(learner.denoiser, learner.predict, x, design.network_time)
            features = learner.features()
            queue = [output, *queue][: settings.resolved_order]
    return x


def endpoint_numbers(loss: Tensor) -> dict[str, Tensor]:
    """What is logged of an endpoint update."""
    return {"loss": loss.detach(), "endpoint": loss.detach()}

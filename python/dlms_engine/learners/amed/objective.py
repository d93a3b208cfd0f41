"""AMED: approximate mean-direction distillation (Zhou et al., CVPR 2024, Algorithm 1).

One solver step at a time: the student's step from t_n to t_{n+1} is matched to a many-step
teacher's state, through the one network evaluation in the middle of the step, and the predictor is
updated before the next step. Memory holds one network graph, whatever the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.adjoint import walk
from ...engine.captured_calls import recomputed
from ...engine.sampler import Sampler
from ...models.denoiser import Denoiser, per_sample
from ...policies.amed import AmedPolicy
from ...policies.amed_formulas import Walk, level_range
from ...policies.amed_predictor import AmedPredictor, Choice
from ...policies.static_table import mean_decisions
from ...solvers import SOLVERS
from ...support.parallel import World
from ...support.transfer import host_numbers
from ..settings import plain
from ..training.bottleneck import feature_size, reads_bottleneck
from ..training.coordinates import Coordinates
from ..training.learner import Numbers
from ..training.losses import log_distance
from ..training.validation import Validation
from .settings import AmedSettings

INFINITE_GRADIENT = 1e5


class Amed:
    """The AMED objective over a predictor."""

    def __init__(
        self,
        denoiser: Denoiser,
        settings: AmedSettings,
        shape: tuple[int, ...],
        *,
        seed: int = 0,
        **conditions: Any,
    ) -> None:
        reads = reads_bottleneck(denoiser, settings.bottleneck, "amed")
        settings = dataclasses.replace(settings, bottleneck=reads)
        self.coordinates = Coordinates.of(denoiser, settings.coordinates_on(denoiser.process))
        model, self.denoiser = denoiser, self.coordinates.denoiser
        self.settings = settings
        self.conditions = conditions
        self.progress = 0.0  # share of the run that is done, set by the trainer
        process = self.denoiser.process
        self.grid, fine = map(self.coordinates.times, settings.grids(model.process))
        self._start = float(process.sigma(self.grid[0]))
        self._here = self.grid.to(denoiser.device)
        self._asked = level_range(process)
        self._teacher = settings.teacher_table(process, fine)
        size = (
            feature_size(self.denoiser, shape, self.grid[0], conditions)
            if settings.bottleneck
            else 64
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictor = AmedPredictor(
                size, settings.scale_dir, settings.scale_time, bottleneck=settings.bottleneck
            )
        self.module: nn.Module = predictor.to(denoiser.device)
        inner = AmedPolicy(predictor, settings.base(), process, self.grid)
        self.policy = self.coordinates.policy(inner)
        self._validation = Validation(
            model,
            shape,
            settings.validation_samples,
            settings.validation_steps,
            None,
            "rmse",
            conditions,
        )

    # -- learner protocol -----------------------------------------------------------------------

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": lr}]

    def iteration(self, noise: Tensor) -> Iterator[Numbers]:
        """One batch of trajectories: yields after every solver step, for an update each."""
        x = noise * self._start
        if self.progress >= 1 - self.settings.endpoint_share:
            loss = self.endpoint_loss(x)
            loss.backward()
            clean_gradients(self.module)
            yield {"loss": loss.detach(), "endpoint": loss.detach()}
            return
        targets = self.teacher_states(x)
        walk = self._walk()
        losses: Numbers = {}
        for i, target in enumerate(targets):
            end, choice = self.student_step(walk, i, x)
            loss = (end - target).square().flatten(1).sum(1).mean()
            loss.backward()
            clean_gradients(self.module)
            losses[f"loss{i + 1}"] = loss.detach()
            yield {"loss": losses[f"loss{i + 1}"], "r": choice.r.mean().detach(), **losses}
            x = target if self.settings.restarts_at_teacher else end.detach()
            walk.rewrite(Tensor.detach)

    def validate(self) -> dict[str, float]:
        return self._validation.measure(
            Sampler(self.coordinates.model, self.policy), self.conditions
        )

    def describe(self) -> dict[str, Any]:
        noise, _ = self._validation.pair()
        model = self.coordinates.model
        choices = mean_decisions(self.policy, model, noise[:16], **self.conditions).values()
        return {name: host_numbers([getattr(c, name) for c in choices]) for name in Choice._fields}

    def fingerprint(self) -> dict[str, Any]:
        return plain(self.settings)

    # -- Algorithm 1 ------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher_states(self, x: Tensor, **conditions: Any) -> list[Tensor]:
        """The teacher's states at the end of every student step, from ``x`` at the grid's start."""
        conditions = {**self.conditions, **conditions}
        after = [state for _, _, state in walk(self.denoiser, self._teacher, x, **conditions)]
        s = self.settings
        stride = SOLVERS[s.teacher_name].evaluations_per_step * (s.teacher_interpolation + 1)
        return [*(after[k * stride - 1] for k in range(1, s.steps)), after[-1]]

    def student_step(self, walk: Walk[Tensor], i: int, x: Tensor) -> tuple[Tensor, Choice]:
        """State at the end of step ``i`` from ``x`` (constant), with gradient in the predictor."""
        t = self._here[i]
        with torch.no_grad():
            features = None
            if i == 0 and self.settings.uses_afs:
                m = walk.analytic(x)
            else:
                m = self._predict(x, t)
                if self.settings.bottleneck:
                    features = self.denoiser.last_features
        batch = x.shape[0]
        levels = (walk.level(i).expand(batch), walk.level(i + 1).expand(batch))
        choice = self.module(features, *levels)
        y = walk.first(i, x, m, choice)
        _, asked = walk.middle(i, choice)
        return walk.second(i, x, y, self._predict(y, asked), choice), choice

    # -- the endpoint phase, not in the paper -------------------------------------------------------

    def endpoint_loss(self, x: Tensor) -> Tensor:
        """Logarithm of the mean squared distance of the student's end to the exact one from ``x``."""
        target = self.coordinates.exact_solution(x, self.settings.endpoint_steps, self.conditions)
        return log_distance(self.student_end(x), target, None, World.current())

    def student_end(self, x: Tensor) -> Tensor:
        """End of the whole run with the graph of every choice; features are data.

        Evaluations are computed again in the backward pass: one network graph is alive at a time.
        """
        walk, batch = self._walk(), x.shape[0]
        for i in range(self.settings.steps):
            features = None
            if i == 0 and self.settings.uses_afs:
                m = walk.analytic(x)
            else:
                m = self._again(x, self._here[i])
                if self.settings.bottleneck and self.denoiser.last_features is not None:
                    features = self.denoiser.last_features.detach()
            levels = (walk.level(i).expand(batch), walk.level(i + 1).expand(batch))
            choice = self.module(features, *levels)
            y = walk.first(i, x, m, choice)
            _, asked = walk.middle(i, choice)
            x = walk.second(i, x, y, self._again(y, asked), choice)
        return x

    def _again(self, x: Tensor, t: Tensor) -> Tensor:
        return recomputed(self.denoiser, self._predict, x, t)

    def _walk(self) -> Walk[Tensor]:
        return Walk(self.settings.base(), self.denoiser.process, self._here, _scaled, self._asked)

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.policy.prediction, **self.conditions)


def _scaled(weight: Tensor, value: Tensor) -> Tensor:
    return per_sample(weight, value) * value


def clean_gradients(module: nn.Module) -> None:
    """NaN becomes 0 and an infinity +-1e5, as in the published code."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            torch.nan_to_num_(
                parameter.grad, nan=0.0, posinf=INFINITE_GRADIENT, neginf=-INFINITE_GRADIENT
            )

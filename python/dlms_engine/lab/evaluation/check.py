"""Whether a denoiser is wrapped rightly, by how its network behaves; if not, what it probably is."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...learners.start.problem import Conditions, read_conditions, rows_of
from ...models.denoiser import BLIND_AT_NOISE, PREDICTIONS, Denoiser, NetworkPrediction
from ...models.preconditioning import NamedTime
from ...processes import EDM, Process, RectifiedFlow, VPDiscrete
from ...support.renamed import one_of_two

_LEVELS = (0.15, 0.5, 1.0, 2.0, 5.0)
"""sigma / alpha, in units of the data's standard deviation, where data are denoised."""
GOOD = 0.9
"""Largest ratio of a denoiser's mean squared error to the better of two that know nothing: the
noisy sample itself, and its best multiple."""
_STEPS = 24


@dataclass(frozen=True)
class Check:
    """What ``check`` found.

    Attributes:
        ok: the wrapping denoises, and no other does it much better.
        score: mean squared error of the data prediction over that of the best multiple of the noisy
            sample, geometric mean over noise levels: below 1 is denoising, well below is good.
        best: description of the wrapping that denoises best.
        scores: every wrapping tried, best first.
        own_samples: no samples were given, so they were drawn with the wrapping itself.
    """

    ok: bool
    score: float
    best: str
    scores: dict[str, float]
    own_samples: bool

    def __str__(self) -> str:
        source = "its own samples" if self.own_samples else "the samples"
        if self.ok:
            return f"this wrapping denoises {source}: error {self.score:.2f} of a blind guess"
        if self.scores[self.best] >= GOOD:
            return (
                f"no wrapping that was tried denoises {source} (best: {self.best}, "
                f"{self.scores[self.best]:.2f} of a blind guess): process, time argument and scale "
                "of the data are worth a look"
            )
        if math.isinf(self.score):
            return (
                f"this wrapping gives nothing finite on {source}; with {self.best} the error is "
                f"{self.scores[self.best]:.2f} of a blind guess"
            )
        return (
            f"this wrapping does not fit: its error on {source} is {self.score:.2f} of a blind guess, "
            f"with {self.best} it is {self.scores[self.best]:.2f}"
        )


@torch.no_grad()
def check(
    denoiser: Denoiser,
    samples: Tensor | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    conditions: Conditions = None,
    cond: Conditions = None,
    count: int = 16,
) -> Check:
    """Tries the wrapping and its neighbours: other predictions and other time arguments.

    A denoiser must come nearer to the data than a multiple of the noisy sample does, at every
    noise level around the data's own deviation; a network taken for what it is not does not.

    Args:
        denoiser: what to check.
        samples: ``[B, ...]`` real data, which decide surely; None samples with the denoiser itself.
        shape: of one sample, needed without ``samples``.
        conditions: keyword arguments of the network, ``learners.start.Conditions``: of a tensor
            ``[M, ...]`` sample i gets the row i mod M.
        cond: their earlier name.
        count: samples to draw without ``samples``.

    Raises:
        ValueError: neither samples nor shape.
        RuntimeError, TypeError, IndexError: of the network, if it takes none of the wrappings.
    """
    if samples is None and shape is None:
        raise ValueError("check needs samples [B, ...], or shape= of one sample")
    given = read_conditions(one_of_two(conditions, cond))
    values = rows_of(given, range(count if samples is None else len(samples)))
    wrapped = describe_wrapping(denoiser)
    every = {wrapped: denoiser, **variants(denoiser)}
    size = None if shape is None else (count, *shape)
    trial = _Trial(size, values)
    data = trial.samples(denoiser) if samples is None else samples.to(denoiser.device)
    scores = {name: trial.score(variant, data) for name, variant in every.items()}
    score, least = scores[wrapped], min(scores.values())
    ok = score < GOOD and score <= 1.25 * least + 0.02
    if not ok and samples is None:  # samples of a wrong wrapping say little: each on its own
        scores = {
            name: trial.score(variant, trial.samples(variant)) for name, variant in every.items()
        }
        score = max(score, scores[wrapped])
    trial.require_one(scores)
    ranked = dict(sorted(scores.items(), key=lambda item: item[1]))
    none_fits = min(ranked.values()) >= GOOD
    best = wrapped if ok else next(n for n in ranked if n != wrapped or none_fits)
    return Check(ok, score, best, ranked, samples is None)


class _Trial:
    """Scores wrappings, some of which the network may refuse: a table of embeddings takes no floats."""

    def __init__(self, size: tuple[int, ...] | None, conditions: dict[str, Any]) -> None:
        self._size, self._conditions = size, conditions
        self._refusals: list[Exception] = []

    def samples(self, denoiser: Denoiser) -> Tensor | None:
        """Its own, None where the network refuses."""
        assert self._size is not None
        try:
            return _own_samples(denoiser, self._size, self._conditions).to(denoiser.device)
        except (RuntimeError, TypeError, IndexError) as refusal:
            self._refusals.append(refusal)
            return None

    def score(self, denoiser: Denoiser, data: Tensor | None) -> float:
        if data is None:
            return math.inf
        try:
            return _score(denoiser, data, self._conditions)
        except (RuntimeError, TypeError, IndexError) as refusal:
            self._refusals.append(refusal)
            return math.inf

    def require_one(self, scores: Mapping[str, float]) -> None:
        """Raises what the network said first, of the wrapping given, if nothing ran."""
        if self._refusals and not any(math.isfinite(score) for score in scores.values()):
            raise self._refusals[0]


def describe_wrapping(denoiser: Denoiser) -> str:
    """``prediction='flow', time_input='reversed'``."""
    level = denoiser._time_input
    if level is None:
        return f"prediction={denoiser.prediction!r}"
    if not isinstance(level, NamedTime):
        return f"prediction={denoiser.prediction!r}, time_input=<yours>"
    scale = "" if level.scale == 1 else f", time_scale={level.scale:g}"
    return f"prediction={denoiser.prediction!r}, time_input={level.name!r}{scale}"


def variants(denoiser: Denoiser) -> dict[str, Denoiser]:
    """Other wrappings of the same network on the same process."""
    process = denoiser.process
    levels: list[Any] = [denoiser._time_input, None, NamedTime(process, "t", 1.0)]
    if isinstance(process, RectifiedFlow):
        levels += [NamedTime(process, n, s) for n in ("t", "reversed") for s in (1.0, 1000.0)]
    elif isinstance(process, EDM):
        levels += [NamedTime(process, "log_sigma", s) for s in (0.25, 1.0)]
    elif isinstance(process, VPDiscrete):
        levels.append(NamedTime(process, "index", 1.0))
    else:
        levels += [NamedTime(process, "t", 1000.0), NamedTime(process, "sigma", 1.0)]
    found = {}
    for prediction in PREDICTIONS:
        if prediction in BLIND_AT_NOISE and _begins_blind(process):
            continue
        for level in levels:
            variant = _with(denoiser, prediction, level)  # type: ignore[arg-type]
            found[describe_wrapping(variant)] = variant
    found.pop(describe_wrapping(denoiser), None)
    return found


def _begins_blind(process: Process) -> bool:
    return float(process.alpha(process.t_max)) == 0


def _with(denoiser: Denoiser, prediction: NetworkPrediction, level: Any) -> Denoiser:
    variant = copy.copy(denoiser)
    variant.__dict__ = dict(denoiser.__dict__)
    variant.prediction, variant._time_input = prediction, level
    return variant


def _own_samples(denoiser: Denoiser, shape: tuple[int, ...], conditions: dict[str, Any]) -> Tensor:
    """By DDIM, in the data form, on times that are uniform in the process's own time."""
    process = denoiser.process
    times = torch.linspace(process.t_max, process.t_min, _STEPS + 1, dtype=torch.float64)
    if isinstance(process, EDM):
        first, last = math.log(process.t_max), math.log(process.t_min)
        times = torch.linspace(first, last, _STEPS + 1, dtype=torch.float64).exp()
    generator = torch.Generator().manual_seed(0)
    x = float(process.sigma(times[0])) * torch.randn(shape, generator=generator)
    x = x.to(denoiser.device)
    for t, t_next in itertools.pairwise(times):
        data = denoiser.predict(x, t, "data", **conditions)
        ratio = float(process.sigma(t_next) / process.sigma(t))
        x = ratio * x + float(process.alpha(t_next) - process.alpha(t) * ratio) * data
    return x


def _score(denoiser: Denoiser, data: Tensor, conditions: dict[str, Any]) -> float:
    if not bool(data.isfinite().all()) or float(data.std()) < 1e-4 or float(data.abs().max()) > 1e4:
        return float("inf")
    process, deviation = denoiser.process, float(data.std())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(data.shape, generator=generator).to(data)
    values = []
    for level in _LEVELS:
        ratio = torch.tensor(level * deviation, dtype=torch.float64)
        low, high = (float(process.sigma_over_alpha(t)) for t in (process.t_min, process.t_max))
        if not low <= float(ratio) <= high:
            continue
        t = process.inverse_sigma(ratio)
        alpha = float(process.alpha(t))
        x = alpha * data + alpha * float(ratio) * noise
        error = (denoiser.predict(x, t, "data", **conditions) - data).square().mean()
        shrunk = x / alpha / (1 + level**2)  # the best multiple for data of this deviation
        blind = min(
            float((shrunk - data).square().mean()), float((x / alpha - data).square().mean())
        )
        values.append(float(error) / blind)
    if not values or not all(math.isfinite(value) for value in values):
        return math.inf
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))

"""Whether a denoiser is wrapped rightly, by how its network behaves; if not, what it probably is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...learners.start.finite import log_level_times
from ...learners.start.problem import (
    Conditions,
    check_conditions,
    conditions_on,
    read_conditions,
    rows_of,
)
from ...models.denoiser import BLIND_AT_NOISE, PREDICTIONS, Denoiser
from ...models.preconditioning import NamedTime
from ...processes import EDM, Process, RectifiedFlow, VPDiscrete
from ...support.renamed import one_of_two
from .levels import deviation_of, noisy, require_samples
from .schedule import OtherTimes, better_times, changed

GOOD = 0.9
"""Largest ratio of a denoiser's mean squared error to the better of two that know nothing: the
noisy sample itself, and its best multiple."""
BLIND = 1.05
"""Largest ratio of a denoiser of data that a blind guess denoises as well: of a Gaussian it is 1."""
_STEPS = 16
"""Of each of two grids, whose times are taken together."""


@dataclass(frozen=True)
class Check:
    """What ``check`` found.

    Attributes:
        ok: the wrapping denoises as far as the data allow, and no other does it much better.
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
        if self.ok and self.score >= GOOD:
            return (
                f"this wrapping denoises {source} as well as a blind guess, {self.score:.2f} of its "
                "error: data close to a Gaussian allow no more, and other wrappings may fit, too"
            )
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
    """Tries the wrapping and its neighbours: other predictions, time arguments and schedules.

    A denoiser must come nearer to the data than a multiple of the noisy sample does, at every
    noise level around the data's own deviation; a network taken for what it is not does not. Guidance
    is left out: what it makes of two predictions is none of the data.

    Args:
        denoiser: what to check.
        samples: ``[B, ...]`` real data, which decide surely, and alone show another schedule of the
            process; None samples with the denoiser itself.
        shape: of one sample, needed without ``samples``.
        conditions: keyword arguments of the network, ``learners.start.Conditions``: of a tensor
            ``[M, ...]`` sample i gets the row i mod M.
        cond: their earlier name.
        count: samples to draw without ``samples``.

    Raises:
        TypeError: the samples are no tensor.
        ValueError: neither samples nor shape, samples that are whole numbers, none or of another shape,
            or conditions that the network does not take.
        RuntimeError, TypeError, IndexError: of the network, if it takes none of the wrappings.
    """
    if samples is None and shape is None:
        raise ValueError("check needs samples [B, ...], or shape= of one sample")
    if samples is not None:
        require_samples(samples, shape)
    given = conditions_on(read_conditions(one_of_two(conditions, cond)), denoiser.device)
    check_conditions(denoiser, given)
    values = rows_of(given, range(count if samples is None else len(samples)))
    denoiser = _unguided(denoiser)
    wrapped = describe_wrapping(denoiser)
    every = {wrapped: denoiser, **variants(denoiser)}
    size = None if shape is None else (count, *shape)
    trial = _Trial(size, values)
    data = trial.samples(denoiser) if samples is None else samples.to(denoiser.device)
    scores = {name: trial.score(variant, data) for name, variant in every.items()}
    score, least = scores[wrapped], min(scores.values())
    # Samples of its own come from the schedule in question, and from too few steps to tell.
    elsewhere = None if data is None or samples is None else trial.better_times(denoiser, data)
    ok = (
        elsewhere is None
        and score <= 1.25 * least + 0.02
        and (score < GOOD or (score < BLIND and trial.nothing_to_know(denoiser.process, data)))
    )
    if not ok and samples is None:  # samples of a wrong wrapping say little: each on its own
        scores = {
            name: trial.score(variant, trial.samples(variant)) for name, variant in every.items()
        }
        score = max(score, scores[wrapped])
    if elsewhere is not None:
        scores[str(elsewhere)] = score / elsewhere.gain
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

    def better_times(self, denoiser: Denoiser, data: Tensor) -> OtherTimes | None:
        """See `schedule`; None where the network refuses."""
        try:
            return better_times(denoiser, data, self._conditions)
        except (RuntimeError, TypeError, IndexError) as refusal:
            self._refusals.append(refusal)
            return None

    def nothing_to_know(self, process: Process, data: Tensor | None) -> bool:
        """Whether the samples' neighbours do not denoise a sample better than a blind guess does."""
        return data is not None and _neighbours(process, data) >= GOOD

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
            variant = changed(denoiser, prediction=prediction, _time_input=level)
            found[describe_wrapping(variant)] = variant
    found.pop(describe_wrapping(denoiser), None)
    return found


def _begins_blind(process: Process) -> bool:
    return float(process.alpha(process.t_max)) == 0


def _unguided(denoiser: Denoiser) -> Denoiser:
    """Its conditional branch alone: what guidance makes of both is no E[x0 | x]."""
    return denoiser if denoiser.guidance_scale is None else changed(denoiser, guidance_scale=1.0)


def _own_samples(denoiser: Denoiser, shape: tuple[int, ...], conditions: dict[str, Any]) -> Tensor:
    """By DDIM, in the data form, on times uniform in the process's own time and in the log level.

    Data of a usual size are made on the first of the two, much larger or smaller ones on the second.
    """
    process = denoiser.process
    uniform = torch.linspace(process.t_max, process.t_min, _STEPS + 1, dtype=torch.float64)
    logarithmic = log_level_times(process, _STEPS + 1)
    times = torch.cat([uniform, logarithmic]).unique().flip(0)  # rising, so turned round
    if isinstance(process, EDM):
        times = logarithmic
    generator = torch.Generator().manual_seed(0)
    x = float(process.sigma(times[0])) * torch.randn(shape, generator=generator)
    x = x.to(denoiser.device)
    for t, t_next in itertools.pairwise(times):
        data = denoiser.predict(x, t, "data", **conditions)
        ratio = float(process.sigma(t_next) / process.sigma(t))
        x = ratio * x + float(process.alpha(t_next) - process.alpha(t) * ratio) * data
    if float(process.sigma(times[-1])) > 0:  # of small data the noise that is left is most
        end = denoiser.predict(x, times[-1], "data", **conditions)
        x = end if bool(end.isfinite().all()) else x
    return x


def _score(denoiser: Denoiser, data: Tensor, conditions: dict[str, Any]) -> float:
    """Mean squared error over that of a blind guess, geometric mean over the levels."""

    def error(x: Tensor, t: Tensor, _ratio: float) -> Tensor:
        return (denoiser.predict(x, t, "data", **conditions) - data).square().mean()

    return _against_blind(denoiser.process, data, error)


def _neighbours(process: Process, data: Tensor) -> float:
    """The score of the posterior mean over the other samples."""

    def error(x: Tensor, t: Tensor, ratio: float) -> Tensor:
        noisy, others = (x / process.alpha(t).to(x)).flatten(1).double(), data.flatten(1).double()
        distance = torch.cdist(noisy, others).square() / (2 * ratio**2)
        distance.fill_diagonal_(math.inf)
        return (torch.softmax(-distance, dim=1) @ others - others).square().mean()

    return _against_blind(process, data, error) if len(data) > 1 else math.inf


def _against_blind(
    process: Process, data: Tensor, error: Callable[[Tensor, Tensor, float], Tensor]
) -> float:
    """Of ``error(noisy samples [B, ...], t, sigma / alpha)``; infinite where nothing can be said."""
    deviation, values = deviation_of(data), []
    for x, t, ratio in noisy(process, data):
        rescaled = x / float(process.alpha(t))
        shrunk = rescaled / (1 + (ratio / deviation) ** 2)  # best for data of this deviation
        blind = min(
            float((shrunk - data).square().mean()), float((rescaled - data).square().mean())
        )
        values.append(float(error(x, t, ratio)) / blind if blind > 0 else math.inf)
    if not values or not all(math.isfinite(value) for value in values):
        return math.inf
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))

"""A network is refused where its answers are no function of the sample, or not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlms_engine import Denoiser, distill, recommend
from dlms_engine.learners.start import SamplingProblem
from dlms_engine.learners.start.repeatable import require_repeatable
from dlms_engine.processes import EDM, RectifiedFlow


class Small(nn.Module):
    def __init__(self, *last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *last, nn.Linear(8, 2))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += len(x)
        found: Tensor = self.body(torch.cat([x, t[:, None]], 1))
        return found


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Dropout(0.1), "answers one sample in two ways"),
        (nn.BatchNorm1d(8), r"body.2 \(BatchNorm1d\) takes its statistics from the batch"),
    ],
    ids=["dropout", "batch norm"],
)
def test_it_is_refused_and_eval_is_not(module: nn.Module, said: str) -> None:
    network = Small(module)
    denoiser = Denoiser(network, RectifiedFlow())
    for call in (recommend, distill):
        with pytest.raises(ValueError, match=f"training mode .*{said}.*network.eval"):
            call(denoiser, nfe=2, shape=(2,), progress=False)
    network.eval()
    require_repeatable(SamplingProblem(denoiser, (2,)))


def test_training_mode_alone_is_no_reason() -> None:
    network = Small()
    require_repeatable(SamplingProblem(Denoiser(network, RectifiedFlow()), (2,)))
    assert network.training and network.calls == 11


class Cache:
    """Gives back its last answer in every second call, as a feature cache does."""

    def __init__(self, phase: int) -> None:
        self.calls, self.phase, self.last = 0, phase, torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2 == self.phase or self.last.shape != x.shape:
            self.last = (1 + t[:, None]) * x.tanh()
        return self.last


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda x, t: F.dropout(x + t[:, None], 0.5), "answers one sample in two ways"),
        (lambda x, t: x + 0.1 * torch.randn_like(x), "answers one sample in two ways"),
        (Cache(0), "answers one sample in two ways"),
        (Cache(1), "answers one sample in two ways"),
        (lambda x, t: x - x.mean(0), "depends on the rest of the batch"),
        (lambda x, t: x / x.square().mean().sqrt(), "depends on the rest of the batch"),
    ],
    ids=[
        "functional dropout",
        "noise",
        "cache",
        "other cache",
        "mean of the batch",
        "scale of the batch",
    ],
)
def test_plain_functions_are_looked_at_too(network: Any, said: str) -> None:
    """Only modules in training mode were: others were measured against a solution of nothing."""
    denoiser = Denoiser(network, RectifiedFlow())
    for call in (recommend, distill):
        with pytest.raises(ValueError, match=said):
            call(denoiser, nfe=2, shape=(2,), progress=False)


def test_half_precision_may_round_another_batch_otherwise() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return (x.tanh() + t[:, None]) * (1 + 0.004 * len(x))

    require_repeatable(SamplingProblem(Denoiser(network, RectifiedFlow()), (2,)))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.0, 0.02, "from t = 0.0"),
        (1.0, 2.0, "from t = 1.9"),
        (70.0, 90.0, "from t = 80 to t = 7"),
    ],
)
def test_the_times_of_outputs_that_are_not_finite_are_named(
    low: float, high: float, said: str
) -> None:
    """A few evaluations pass them by: the error sent to a sampler, which showed nothing."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        bad = ((t >= low) & (t <= high))[:, None]
        return torch.where(bad, torch.nan, x / (1 + t[:, None] ** 2))

    denoiser = Denoiser(network, EDM(), "data")
    for call in (recommend, distill):
        with pytest.raises(FloatingPointError, match=said):
            call(denoiser, nfe=2, shape=(2,), progress=False)

"""A network left in training mode is refused where its answers are no function of the sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dlms_engine import Denoiser, distill, recommend
from dlms_engine.learners.start import SamplingProblem
from dlms_engine.learners.start.repeatable import require_repeatable
from dlms_engine.processes import RectifiedFlow


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
    assert network.training and network.calls == 2
    network.eval()
    require_repeatable(SamplingProblem(Denoiser(network, RectifiedFlow()), (2,)))
    assert network.calls == 2, "a network in evaluation mode is not asked"

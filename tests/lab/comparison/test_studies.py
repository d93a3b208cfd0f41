"""Every contestant of the paper's studies can be distilled: none is refused for its settings."""

from __future__ import annotations

from pathlib import Path

import cli_model
import pytest
import torch

from dlms_engine.engine.sampler import Sampler
from dlms_engine.lab.comparison import STUDIES, choose
from dlms_engine.lab.comparison.distilled import Workshop

LABELS = [
    (study, contestant.label) for study in sorted(STUDIES) for contestant in choose(None, study)
]


@pytest.mark.parametrize(("study", "label"), LABELS)
def test_it_distils(study: str, label: str, tmp_path: Path) -> None:
    held = cli_model.tiny()
    assert held.features is not None
    shop = Workshop(held.denoiser, held.features, held.shape, tmp_path, 1, lambda done: None)
    contestant = next(each for each in choose(None, study) if each.label == label)
    policy, calls = shop._run(contestant, 3, 32, None)
    assert policy.nfe == 3 and calls.total > 0
    noise = 80.0 * torch.randn(2, *held.shape, generator=torch.Generator().manual_seed(0))
    found = Sampler(held.denoiser, policy)(noise)
    assert isinstance(found, torch.Tensor) and bool(found.isfinite().all())

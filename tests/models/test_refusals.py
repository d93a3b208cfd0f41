"""What a caller gets wrong on the first day is refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixture_network import mixture_denoiser
from torch import Tensor

from dlms_engine import Denoiser, distill, recommend
from dlms_engine.processes import EDM


def first_channel(x: Tensor, t: Tensor) -> Tensor:
    return x[:, :1]


def test_an_output_that_is_not_like_its_input_is_no_prediction() -> None:
    """One channel of three was spread over all of them, and solvers were ranked on that."""
    denoiser = Denoiser(first_channel, EDM(), prediction="data")
    with pytest.raises(ValueError, match=r"returned \[4, 1, 2, 2\] for x \[4, 3, 2, 2\]"):
        denoiser(torch.zeros(4, 3, 2, 2), 1.0)
    with pytest.raises(ValueError, match="expected a tensor like x"):
        recommend(denoiser, nfe=3, shape=(3, 2, 2), effort="lean", progress=False)
    assert denoiser(torch.zeros(4, 1, 2, 2), 1.0).shape == (4, 1, 2, 2)


def test_a_class_is_no_process() -> None:
    with pytest.raises(TypeError, match=r"process is the class EDM, expected one: EDM\(\)"):
        Denoiser(first_channel, EDM, prediction="data")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"effort": "fast"}, "effort is 'fast'"),  # it was lean, without a word
        ({"shape": 16}, "shape is 16, expected that of one sample"),
        ({"shape": "16"}, "shape is '16', expected that of one sample"),
        ({"shape": (-1, 4)}, "a size in shape is -1"),
        ({"nfe": 2.5}, "nfe is 2.5"),
        ({"conditions": [1, 2]}, "conditions are list, expected keywords"),
    ],
)
def test_recommend_refuses_by_value(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        recommend(mixture_denoiser(), **({"nfe": 3, "shape": (16,), "progress": False} | wrong))


@pytest.mark.parametrize("wrong", [{"shape": 16}, {"cond": [1, 2]}])
def test_distill_refuses_by_value(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected"):
        distill(mixture_denoiser(), **({"nfe": 3, "shape": (16,), "progress": False} | wrong))

"""Forwards that were replaced by hand, and what may remember earlier calls among them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine.integrations.pipelines.situation import remembers, situation


class Helper:
    def __init__(self) -> None:
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = x if self.kept is None else self.kept
        return self.kept


def held_by_a_dict(layer: nn.Module) -> Any:
    kept: dict[str, Any] = {}
    plain = layer.forward
    return lambda x: kept.setdefault("output", plain(x))


def held_by_a_helper(layer: nn.Module) -> Any:
    helper, plain = Helper(), layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return helper.forward(plain(x))

    return forward


def held_by_an_argument(layer: nn.Module) -> Any:
    def forward(plain: Any, kept: list[Any], x: torch.Tensor) -> torch.Tensor:
        return plain(x)

    return functools.partial(forward, layer.forward, [])


def stateless(layer: nn.Module) -> Any:
    scale, plain = 1.1, layer.forward
    return lambda x: scale * plain(x)


MADE: dict[str, Any] = {
    "a dict": held_by_a_dict,
    "a Helper": held_by_a_helper,
    "a list": held_by_an_argument,
    "": stateless,
}


@pytest.mark.parametrize("kind", MADE)
def test_what_a_replaced_forward_holds(kind: str) -> None:
    """DeepCache's would be captured on a GPU: its runs would not be what they are step by step."""
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert remembers(network) is None
    network[0].forward = MADE[kind](network[0])
    found = remembers(network)
    if kind:
        assert (
            found is not None
            and f"the forward of 0 was replaced by a function that holds {kind}" in found
        )
    else:
        assert found is None


def test_a_replaced_method_of_the_class_is_seen() -> None:
    class Layer(nn.Linear):
        pass

    network = nn.Sequential(Layer(2, 2))
    kept: list[Any] = []
    Layer.forward = lambda self, x: kept  # type: ignore[assignment, misc]
    assert "holds a list" in str(remembers(network))


def test_a_number_that_counts_is_another_situation() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    plain, calls = network[0].forward, 0

    def forward(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(x)

    network[0].forward = forward
    before = situation(network)
    assert before == situation(network)
    network(torch.zeros(1, 2))
    assert before != situation(network)


def test_hooks_are_another_situation() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    before = situation(network)
    handle = network[0].register_forward_hook(lambda *_: None)
    assert situation(network) != before
    handle.remove()
    assert situation(network) == before

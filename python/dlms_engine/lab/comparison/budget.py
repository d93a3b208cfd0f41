"""Network calls counted, and the trajectories that a budget of them pays for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.denoiser import Denoiser
from ...models.tap import unwrap

PROBES = (1, 3, 12)
"""Batches at which the cost of a training is measured, the last where the first two do not say it."""
OVERSPENT = 1.2
"""Times its budget, above which a training is made again with fewer trajectories."""


@dataclass
class Calls:
    """Network calls, one for each sample in the batch.

    Attributes:
        forward: evaluations.
        backward: of these, the ones gradients ran back through.
    """

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """What a budget is spent on: a pass in either direction is one call."""
        return self.forward + self.backward


class _Called(nn.Module):
    """A plain callable as a module; its parameters' names stay known."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def countable(denoiser: Denoiser) -> Denoiser:
    """The same model with a module for a network, whose calls ``counted`` can count."""
    if isinstance(denoiser.network, nn.Module):
        return denoiser
    variant = copy.copy(denoiser)
    variant.__dict__ = {**denoiser.__dict__, "_modules": dict(denoiser._modules)}
    variant.network = _Called(denoiser.network)
    return variant


@contextmanager
def counted(network: Any, advance: Callable[[int], None] | None = None) -> Iterator[Calls]:
    """Counts the calls of ``network`` inside the block.

    Args:
        advance: called with the number of network calls as they are made.

    Raises:
        TypeError: not a module: a plain callable offers no place to count at.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"the network is a {type(network).__name__}, expected a torch.nn.Module")
    calls = Calls()

    def count(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        samples = inputs[0].shape[0]
        before = calls.total
        calls.forward += samples
        if torch.is_grad_enabled() and unwrap(output).requires_grad:
            calls.backward += samples
        if advance is not None:
            advance(calls.total - before)

    handle = network.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def affordable(cost: Callable[[int], int], budget: int, batch: int) -> int:
    """Trajectories, a multiple of ``batch``, whose training costs about ``budget`` calls.

    Args:
        cost: trajectories -> network calls; called at the first two of ``PROBES`` batches, and taken for
            a straight line (validation and set-up are its intercept). Where that falls, as the smaller
            training was concluded with more work or the larger ended early, the last two make the line,
            and where that falls too, a batch is taken to cost all that one did.

    Raises:
        ValueError: the budget does not pay for one batch.
    """
    one, few, more = PROBES
    first, second = cost(batch * one), cost(batch * few)
    slope, fixed = _line(one, first, few, second)
    if slope < batch:  # not even a call a trajectory
        slope, fixed = _line(few, second, more, cost(batch * more))
    if slope < batch:
        slope, fixed = max(1.0, first / one), 0.0
    batches = int((budget - fixed) // slope)
    if batches < 1:
        raise ValueError(
            f"budget is {budget:,} network calls, but set-up takes {fixed:,.0f} and a batch "
            f"{slope:,.0f}: give at least {fixed + slope:,.0f}"
        )
    return batch * batches


def _line(low: int, at_low: int, high: int, at_high: int) -> tuple[float, float]:
    """Slope and intercept, at least zero."""
    slope = (at_high - at_low) / (high - low)
    return slope, max(0.0, at_low - low * slope)


def fewer_for(trajectories: int | None, spent: int, budget: int, batch: int) -> int | None:
    """Trajectories, a multiple of ``batch``, for a training that took more than a fifth above its budget;
    None where it kept to it or there are no fewer. Its probes may have ended early.
    """
    if trajectories is None or spent <= OVERSPENT * budget:
        return None
    fewer = int(trajectories * budget / spent) // batch * batch
    return fewer if 0 < fewer < trajectories else None

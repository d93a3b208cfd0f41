"""Refuses a network in training mode whose answer is not a function of the sample."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...processes.base import as_level
from ...support.transfer import host_numbers
from .problem import SamplingProblem

_SAME = 1e-3
"""Largest difference of two answers, as a share of their size, that arithmetic may explain."""


@torch.no_grad()
def require_repeatable(problem: SamplingProblem) -> None:
    """A solver is fitted to one ODE: with dropout switched on there is another one in every call.

    Two evaluations of one sample, where a module is in training mode; else none.

    Raises:
        ValueError: the answers differ, or depend on the batch (batch normalisation in training mode,
            which sampling would change for good, too).
    """
    network = problem.denoiser.network
    if not isinstance(network, nn.Module):
        return
    training = [(name, module) for name, module in network.named_modules() if module.training]
    if not training:
        return
    for name, module in training:
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"the network is in training mode and {name} ({type(module).__name__}) takes its "
                "statistics from the batch: call network.eval() first"
            )
    numbers = range(1)
    x, t = problem.noise(numbers), as_level(problem.process.t_max)
    condition = problem.condition(numbers)
    first, second = (problem.denoiser.predict(x, t, **condition) for _ in range(2))
    size, difference = host_numbers([first.abs().max(), (first - second).abs().max()])
    if difference > _SAME * size:
        raise ValueError(
            f"the network is in training mode and answers one sample in two ways (they differ by "
            f"{difference:.2g} of {size:.2g}), as dropout does: call network.eval() first"
        )

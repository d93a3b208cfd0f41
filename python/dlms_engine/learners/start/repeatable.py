"""Refuses a network whose answer is not a function of the sample alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...processes.base import as_level
from ...support.transfer import host_numbers
from .problem import SamplingProblem

_SAME = 1e-3
"""Largest difference of two answers, as a share of their size, that arithmetic may explain."""
_ROUGH = 2e-2
"""The same where the arithmetic is another one: half precision, another size of the batch."""
_BATCH = 4
"""Samples of the batch that one of them is asked for in."""


@torch.no_grad()
def require_repeatable(problem: SamplingProblem) -> None:
    """A solver is fitted to one ODE: with dropout switched on there is another one in every call.

    Seven evaluations of one sample, four of them at other times, and one of four samples.

    Raises:
        ValueError: the answers differ, or depend on the rest of the batch (batch normalisation in
            training mode, which sampling would change for good, too).
    """
    network = problem.denoiser.network
    modules = list(network.named_modules()) if isinstance(network, nn.Module) else []
    training = [(name, module) for name, module in modules if module.training]
    for name, module in training:
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"the network is in training mode and {name} ({type(module).__name__}) takes its "
                "statistics from the batch: call network.eval() first"
            )
    alone, process = range(1), problem.process
    # two other times between, twice: a cache that answers every second call comes to light
    start, *between = (process.t_max - n / 3 * (process.t_max - process.t_min) for n in range(3))
    first, *others = (_answer(problem, alone, t) for t in [*[start, *between] * 2, start])
    again = torch.stack([others[2], others[5]])
    size, difference = host_numbers([first.abs().max(), (first - again).abs().max()])
    half = problem.denoiser.network_dtype in (torch.float16, torch.bfloat16)
    if difference > (_ROUGH if half else _SAME) * size:
        kind = "is in training mode and answers" if training else "answers"
        cure = (
            "as dropout does: call network.eval() first"
            if training
            else "as functional dropout does, noise drawn inside or a cache of earlier calls: switch "
            "that off, a solver is for one function of state and time"
        )
        raise ValueError(
            f"the network {kind} one sample in two ways (they differ by {difference:.2g} of {size:.2g}), "
            f"{cure}"
        )
    among = _answer(problem, range(_BATCH), start)[:1]
    difference = host_numbers([(first - among).abs().max()])[0]
    if difference > _ROUGH * size:
        raise ValueError(
            f"the network's answer for one sample depends on the rest of the batch (alone and in a batch "
            f"of {_BATCH} it differs by {difference:.2g} of {size:.2g}), as statistics over the batch "
            "do: let it look at each sample alone"
        )


def _answer(problem: SamplingProblem, numbers: range, t: float) -> Tensor:
    """E[x0 | x] of the samples' start noise at time ``t``."""
    return problem.predict(problem.noise(numbers), as_level(t), numbers).double()

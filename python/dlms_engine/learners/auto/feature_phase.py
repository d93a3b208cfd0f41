"""The corrector's second phase: the product of pixel and feature distance.

A residual fitted to pixels alone may take away what it cannot predict and leave samples too smooth;
the network's own features at a low noise level notice that. This phase needs gradients through one
evaluation of the network and is left out, with a word, where there are none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...policies.corrector import Corrector
from ...support.optimiser import optimiser_step
from ...support.transfer import host_numbers
from ..start import SamplingProblem
from .budget import Budget
from .features import feature_batch, features_of

_log = logging.getLogger("dlms_engine")

BATCH, UPDATES = 16, 160
CALLS = 4
"""Evaluations an update costs a sample: one forward, two for its backward, one to spare."""


def train_on_features(
    problem: SamplingProblem,
    corrector: Corrector,
    ends: Tensor,
    inputs: Tensor,
    target: Tensor,
    budget: Budget,
    share: float,
    *,
    held: int,
    lr: float = 5e-4,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Goes on training on all but the last ``held`` samples; keeps what is best on those.

    Args:
        ends: ``[B, ...]`` ends of the table; ``inputs`` of the corrector, ``target`` the exact ends.
        share: of the budget that may be used when it is done.
    """
    fit = len(target) - held
    chosen = min(held, 64)
    fixed = 2 * chosen + fit
    updates = min(UPDATES, int((budget.left_until(share) - fixed) / (CALLS * BATCH)))
    if problem.denoiser.features is None or updates < 20 or fit < BATCH:
        return
    numbers = range(len(target))
    with torch.no_grad():
        wanted = features_of(problem, target, numbers)
    assert wanted is not None
    check = slice(fit, fit + chosen)

    def product(rows: Tensor | slice, numbers: range) -> Tensor:
        end = ends[rows] + corrector.residual(inputs[rows])
        pixels = (end - target[rows]).square().mean()
        seen = feature_batch(problem, end, numbers)
        return pixels.log() + (seen - wanted[rows]).square().sum(1).mean().log()

    with torch.no_grad():
        (first,) = host_numbers([product(check, range(fit, fit + chosen))])
    best = first
    kept = {k: v.detach().clone() for k, v in corrector.named_parameters()}
    optimiser = torch.optim.Adam(corrector.parameters(), lr=lr)
    try:
        for update in range(updates):
            low = (update * BATCH) % (fit - BATCH + 1)
            optimiser.param_groups[0]["lr"] = lr * (1 - update / updates)
            optimiser.zero_grad(set_to_none=True)
            product(slice(low, low + BATCH), range(low, low + BATCH)).backward()
            optimiser_step(optimiser)
            if (update + 1) % 20 == 0:
                with torch.no_grad():
                    (score,) = host_numbers([product(check, range(fit, fit + chosen))])
                if score < best:
                    best = score
                    kept = {k: v.detach().clone() for k, v in corrector.named_parameters()}
            if budget.share() >= max(share, 0.97):
                break
    except RuntimeError as error:
        _log.info("no feature phase: the network gives no gradients (%s)", error)
    with torch.no_grad():
        for key, value in corrector.named_parameters():
            value.copy_(kept[key])
    gain = 0.5 * (first - best)
    say(f"  feature phase: {updates} updates, product of distances x {math.exp(-gain):.3f}")

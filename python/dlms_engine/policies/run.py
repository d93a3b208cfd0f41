"""The plainest loop: a prediction is formed and handed to the row, in torch operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..models.denoiser import Denoiser, per_sample
from ..solvers.policy import Policy
from .corrector import Correctors


def run_predictions(
    denoiser: Denoiser,
    policy: Policy,
    x: Tensor,
    conditions: dict[str, Any],
    after: Callable[[int, Tensor], object] | None = None,
    correctors: Correctors | None = None,
) -> Tensor:
    """The sample ``[B, ...]`` from ``x`` ``[B, ...]`` at the policy's start, in ``x``'s dtype.

    The way for whatever alters predictions (thresholding) and for whoever only wants to know what
    the policy decides; ``Sampler`` has faster ones.

    Args:
        after: called with (n, state) after each row.
        correctors: what follows the rows, if anything does.
    """
    run = policy.start(x.shape[0], x.device)  # len(x) would tie an exported graph to this batch
    history: list[Tensor] = []
    time = run.time
    x = per_sample(run.initial_scale, x) * x
    for n in range(policy.nfe):
        history.insert(0, denoiser.predict(x, time, policy.prediction, **conditions))
        del history[policy.depth :]  # a long run would hold every output
        features = denoiser.last_features if denoiser.features else None
        a, b, next_time = run.row(n, features)
        x = per_sample(a, x) * x
        for k, m in enumerate(history[: b.shape[-1]]):
            x = x + per_sample(b[..., k], x) * m
        time = time if next_time is None else next_time
        if correctors is not None:
            x = correctors(n, x, history)
        if after is not None:
            after(n, x)
    return x

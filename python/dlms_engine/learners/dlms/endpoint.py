"""The endpoint phase of DLMS: gradients through the whole run, towards the exact solution.

Not in the paper. Algorithm 1 charges each step for its own error only, and pulls times down where
nothing charges for what that does later (docs/learners/dlms.md); a short phase on the end itself
repairs this. Network evaluations are recomputed in backward: one network graph is alive at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..training.losses import log_distance
from ..training.validation import exact_solution

if TYPE_CHECKING:
    from .objective import Dlms


def endpoint_loss(learner: Dlms, x: Tensor) -> Tensor:
    """Distance of the student's end to the exact one from the same start ``x`` ``[B, ...]``.

    With a feature distance the loss is the sum of the logarithms of the mean squared pixel and
    feature distances: their product, free of scales, is what validation scores by.
    """
    settings = learner.settings
    target = exact_solution(learner.denoiser, x, settings.endpoint_steps, **learner.cond)
    return log_distance(student_end(learner, x), target, learner.distance, learner.world)


def student_end(learner: Dlms, x: Tensor) -> Tensor:
    """The student's end with the graph of every design; the features stay data, as in training."""
    settings = learner.settings
    t = learner.module.grid[0].expand(x.shape[0])
    carry = learner.first(x, t)
    queue, features = carry.queue, carry.features

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return learner.predict(x, t)

    for n in range(1, settings.steps + 1):
        design = learner.module(features, t, n)
        x = learner.advance(x, t, design.time, design.weights, queue)
        t = design.time
        if n < settings.steps:
            output: Any = checkpoint(predict, x, design.network_time, use_reentrant=False)
            features = learner.features()
            queue = [output, *queue][: settings.resolved_order]
    return x


def endpoint_numbers(loss: Tensor) -> dict[str, Tensor]:
    """What is logged of an endpoint update."""
    return {"loss": loss.detach(), "endpoint": loss.detach()}

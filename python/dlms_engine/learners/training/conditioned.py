"""A denoiser with the samples' conditions built in, for learners that know one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...models.denoiser import Denoiser
from ..start.problem import Conditions, read_conditions, rows_of

PER_SAMPLE = ("dlms", "amed", "free_table")
"""Methods that tell the denoiser which samples a batch holds, besides "auto"."""


class ConditionedDenoiser(Denoiser):
    """``denoiser`` whose sample i of a batch gets the condition of sample ``first + i``.

    It shares the network, the tap and everything else with ``denoiser``.

    Args:
        conditions: as in ``learners.start.Conditions``.
    """

    def __init__(self, denoiser: Denoiser, conditions: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(denoiser.__dict__)
        self._conditions = conditions
        self._first = 0

    def first_sample(self, number: int) -> None:
        """Number of the first sample of the next batches; learners call it."""
        self._first = number

    def network_output(
        self, network_input: Tensor, c_noise: Tensor, **cond: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        numbers = range(self._first, self._first + len(network_input))
        rows = rows_of(self._conditions, numbers)
        return super().network_output(network_input, c_noise, **{**rows, **cond})


def conditioned(denoiser: Denoiser, conditions: Conditions, method: str) -> Denoiser:
    """``denoiser`` with ``conditions``; itself without any.

    Raises:
        ValueError: a condition for every sample where ``method``, or a run on a GPU, knows only one
            for all.
    """
    values = read_conditions(conditions)
    if not values:
        return denoiser
    varied = not isinstance(values, Mapping) or any(
        isinstance(v, Tensor) and v.ndim and len(v) > 1 for v in values.values()
    )
    device = denoiser.device
    if varied and (method not in PER_SAMPLE or device.type != "cpu"):
        raise ValueError(
            f"method {method!r} on {device.type} takes one condition for all samples, tensors "
            "[1, ...]: use method 'auto' for a condition of every sample"
        )
    return ConditionedDenoiser(denoiser, values)

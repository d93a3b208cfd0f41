"""A denoiser with the samples' conditions built in, for learners that know one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...models.denoiser import Denoiser
from ..start.problem import Conditions, conditions_on, read_conditions, rows_of, vary

PER_SAMPLE = ("dlms", "amed", "free_table")
"""Methods that tell the denoiser which samples a batch holds, besides "auto"."""


class _Batch:
    """Which samples come next; a captured run takes their conditions as its inputs."""

    _outside_graph_keys = True

    def __init__(self) -> None:
        self.first = 0
        self.names: frozenset[str] | None = None


class ConditionedDenoiser(Denoiser):
    """``denoiser`` whose sample i of a batch gets the condition of sample ``first + i``.

    It shares the network, the tap and everything else with ``denoiser``.

    Args:
        conditions: as in ``learners.start.Conditions``.
    """

    def __init__(self, denoiser: Denoiser, conditions: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(denoiser.__dict__)
        self._conditions = conditions_on(conditions, denoiser.device)
        self._batch = _Batch()

    def first_sample(self, number: int) -> None:
        """Number of the first sample of the next batches; learners call it."""
        self._batch.first = number

    @property
    def next_sample(self) -> int:
        """What ``first_sample`` was told."""
        return self._batch.first

    def batch_conditions(self, batch: int) -> dict[str, Any]:
        """As ``Denoiser.batch_conditions``."""
        first = self._batch.first
        rows = rows_of(self._conditions, range(first, first + batch))
        self._batch.names = frozenset(rows)
        return rows

    def network_output(
        self, network_input: Tensor, c_noise: Tensor, **conditions: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        names = self._batch.names
        given = names is not None and names <= conditions.keys()  # by a captured run, as its inputs
        rows = {} if given else self.batch_conditions(len(network_input))
        return super().network_output(network_input, c_noise, **{**rows, **conditions})


def conditioned(denoiser: Denoiser, conditions: Conditions, method: str) -> Denoiser:
    """``denoiser`` with ``conditions``; itself without any.

    Raises:
        ValueError: a condition for every sample where ``method`` knows only one for all.
    """
    values = read_conditions(conditions)
    if not values:
        return denoiser
    varied = not isinstance(values, Mapping) or vary(values)
    if varied and method not in PER_SAMPLE:
        raise ValueError(
            f"method {method!r} takes one condition for all samples, tensors [1, ...]: use one of "
            f"{', '.join(('auto', *PER_SAMPLE))} for a condition of every sample"
        )
    return ConditionedDenoiser(denoiser, values)

"""Which reading of the calls' outputs as branches the scheduler's model output is a mix of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from .calls import Call, NotReplayed, misfit, solve_weights
from .forms import read_columns
from .program import Columns, mixed_products

Reading = tuple[Columns, ...]


def nearest(
    calls: Sequence[Call],
    options: Sequence[Sequence[Columns]],
    output: Tensor,
    sample: Tensor,
    limit: float,
    slices: int,
) -> tuple[float, Reading, Tensor]:
    """The reading whose mix comes nearest to ``output``: its misfit, itself, its products.

    Args:
        options: for each call, ways to read its outputs.
        limit: the first reading with no larger a misfit is taken.
        slices: as in ``Program``.

    Raises:
        NotReplayed: an output is not finite.
    """
    best, products = float("inf"), output
    chosen: Reading = ()
    shape = tuple(sample.shape)
    for reading in _readings(options):
        columns = [
            column
            for call, (form, per_sample) in zip(calls, reading, strict=True)
            for column in read_columns(call.outputs, shape, form, per_sample)
        ]
        found = mixed_products(columns, sample, output, slices).cpu()
        if not bool(found.isfinite().all()):
            raise NotReplayed("the network's outputs are not finite")
        wrong = misfit(found, solve_weights(found))
        if wrong < best:
            best, chosen, products = wrong, reading, found
        if best <= limit:
            break
    return best, chosen, products


def _readings(options: Sequence[Sequence[Columns]]) -> Iterator[Reading]:
    """Calls of one step are read alike if they can."""
    if all(option == options[0] for option in options):
        yield from ((way,) * len(options) for way in options[0])
    else:
        yield from itertools.islice(itertools.product(*options), 64)

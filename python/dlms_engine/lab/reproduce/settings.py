"""What of a published table is made, how large, and what FID is measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.embedded import ReferenceStatistics
from .tables import Panel, TableRow


@dataclass(frozen=True)
class ReproduceSettings:
    """Sizes of a reproduction; None is the table's own.

    Attributes:
        samples: of the distance.
        nfes: evaluations to make, among the table's.
        rows: parts of the names of the rows to make; empty makes all.
        training_seeds: of the distillations that a learned row is the mean of.
        exact_samples: the first of the samples, compared with exact solutions.
        exact_nfe, accurate_nfe: evaluations of exact solutions and, without FID, accurate samples.
        batch: samples at a time; a kill loses one batch.
        first_seed: of the samples; the papers begin at 0.
        changes: settings of the learners in place of the papers'.
    """

    samples: int
    nfes: tuple[int, ...] | None = None
    rows: tuple[str, ...] = ()
    training_seeds: tuple[int, ...] | None = None
    exact_samples: int = 1_000
    exact_nfe: int = 200
    accurate_nfe: int = 32
    batch: int = 250
    first_seed: int = 0
    changes: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}, expected at least 2")
        if self.exact_samples < 0:
            raise ValueError(f"exact_samples is {self.exact_samples}, expected at least 0")


@dataclass(frozen=True)
class Fid:
    """What FID is measured with: Inception's network and the statistics of the data."""

    network: nn.Module
    reference: ReferenceStatistics


def chosen_nfes(panel: Panel, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Those of the table that are ``wanted``, all for None.

    Raises:
        ValueError: one that the table has not.
    """
    chosen = tuple(n for n in panel.nfes if wanted is None or n in wanted)
    unknown = sorted(set(wanted or ()) - set(panel.nfes))
    if unknown:
        raise ValueError(f"nfe has {unknown[0]}, the table has {', '.join(map(str, panel.nfes))}")
    return chosen


def chosen_rows(panel: Panel, parts: Sequence[str]) -> tuple[TableRow, ...]:
    """Those with one of ``parts`` in their names, all for none.

    Raises:
        ValueError: a part that no name has.
    """
    for part in parts:
        if not any(part.lower() in row.name.lower() for row in panel.rows):
            names = ", ".join(row.name for row in panel.rows)
            raise ValueError(f"rows has {part!r}, which is part of none of: {names}")
    return tuple(
        row
        for row in panel.rows
        if not parts or any(part.lower() in row.name.lower() for part in parts)
    )

"""Rows of the comparison table: what they hold, who goes on to the next size, which is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.embedded import ReferenceStatistics
from ..evaluation.frechet import FeatureSums, frechet_distance
from .measure import Entry, Measured


@dataclass(frozen=True)
class Floors:
    """What a perfect solver has at a number of samples, and the sets distances are taken to.

    ``"accurate"`` always; ``"data"`` where the model comes with statistics of its data.
    """

    references: Mapping[str, FeatureSums | ReferenceStatistics]
    values: Mapping[str, float]

    @classmethod
    def of(
        cls, perfect: FeatureSums, other: FeatureSums, reference: ReferenceStatistics | None
    ) -> Floors:
        """Floors at the size of ``perfect``, the accurate samples of the seeds that are compared.

        Args:
            other: sums of accurate samples of other seeds.
            reference: statistics of the data; None leaves the distance to the data out.
        """
        references: dict[str, FeatureSums | ReferenceStatistics] = {"accurate": other}
        if reference is not None:
            references["data"] = reference
        return cls(references, {side: distance(perfect, held) for side, held in references.items()})

    def figures(self, sums: FeatureSums) -> dict[str, float]:
        """``to_*`` and ``excess_*`` for each side."""
        found: dict[str, float] = {}
        for side in self.references:
            value = distance(sums, self.references[side])
            found[f"to_{side}"] = value
            found[f"excess_{side}"] = value - self.values[side]
        return found


def distance(sums: FeatureSums, other: FeatureSums | ReferenceStatistics) -> float:
    """Infinite for samples that are not finite: such a solver comes last, it does not stop us."""
    if not bool(sums.outer.isfinite().all()):
        return math.inf
    return frechet_distance(other, sums)


def measured_row(
    entry: Entry, measured: Measured, size: str, floors: Mapping[str, Floors]
) -> dict[str, Any]:
    return {
        "nfe": entry.nfe,
        "solver": entry.label,
        "learned": entry.learned,
        "facts": entry.facts,
        "rmse": measured.rmse,
        size: floors[size].figures(measured.sums),
    }


def shortlist(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Indices of the best ``count`` by RMSE and half as many by distance, without repetition."""
    by_rmse = sorted(range(len(rows)), key=lambda i: rank(rows[i]["rmse"]))
    by_distance = sorted(range(len(rows)), key=lambda i: rank(rows[i]["screen"]["to_accurate"]))
    return list(dict.fromkeys([*by_rmse[:count], *by_distance[: (count + 1) // 2]]))


def finalists(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Indices of the best ``count`` handcrafted by compared distance, and of every learned one."""
    listed = [i for i, row in enumerate(rows) if "compared" in row]
    hand = [i for i in listed if not rows[i]["learned"]]
    ranked = sorted(hand, key=lambda i: rank(rows[i]["compared"]["to_accurate"]))
    return [*ranked[:count], *(i for i in listed if rows[i]["learned"])]


def rank(value: float | None) -> float:
    """``value`` to sort by; what is missing or no number comes last."""
    return math.inf if value is None or math.isnan(value) else value


def best(
    rows: Sequence[Mapping[str, Any]], nfe: int, *, learned: bool, by: str
) -> Mapping[str, Any] | None:
    """The best row of an nfe by ``"rmse"``, ``"accurate"`` or ``"data"`` (full figures first)."""
    pool = [row for row in rows if row["nfe"] == nfe and row["learned"] == learned]
    for size in ("full", "compared") if by != "rmse" else ("compared",):
        if any(size in row for row in pool):
            pool = [row for row in pool if size in row]
            break
    return min(pool, key=lambda row: rank(figure(row, by)), default=None)


def figure(row: Mapping[str, Any], by: str) -> float:
    """RMSE, or the excess distance on the most samples there are."""
    if by == "rmse":
        return float(row["rmse"])
    size = next(name for name in ("full", "compared", "screen") if name in row)
    return float(row[size][f"excess_{by}"])

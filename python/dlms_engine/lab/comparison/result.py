"""What a comparison holds: its sizes, one row a solver, and the floors that a perfect solver has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from ...models.embedded import ReferenceStatistics
from ..evaluation.frechet import FeatureSums, frechet_distance
from .measure import Entry, Measured

FORMAT = "dlms_engine.comparison/2"

Size = Literal["screen", "compared", "full"]
"""On how many samples a distance was taken: ``screen_samples``, ``exact_samples`` or ``samples``."""


class Cost(TypedDict, total=False):
    """What a distillation took.

    ``trajectories`` are the start noises it was trained on (None: the learner's own number),
    ``forward`` and ``backward`` network calls, one a sample, validation included.
    """

    trajectories: int | None
    forward: int
    backward: int
    seconds: float


class _Solver(TypedDict):
    nfe: int
    solver: str
    learned: bool


class ResultRow(_Solver, Cost, total=False):
    """One solver at one number of evaluations.

    ``to_*`` are Frechet distances, ``excess_*`` what is above the floor at their ``size``. What was
    refused has no figures. A learned solver has a ``method``, and what ``compare`` distilled its cost,
    the ``seed`` of its training noise and as ``base`` the label of the solver it builds on.
    """

    size: Size
    rmse: float
    to_accurate: float
    excess_accurate: float
    to_data: float
    excess_data: float
    method: str
    refused: str
    base: str | None
    seed: int
    errors: dict[str, float]


class Result(TypedDict):
    """The JSON of a comparison; ``settings`` are those of ``record`` or of ``compare``."""

    format: str
    settings: dict[str, Any]
    torch: str
    distance: str
    accurate_rmse: float
    floors: dict[Size, dict[str, float]]
    rows: list[ResultRow]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        nfes: evaluations compared.
        samples: samples of the Frechet distances.
        exact_samples: of these, the first ones whose exact solution gives the RMSE.
        screen_samples: samples on which every handcrafted solver is tried.
        exact_nfe: evaluations of the exact solutions.
        accurate_nfe: evaluations of the accurate samples that distances are taken to.
        batch: samples at a time.
        first_seed: seed of the first sample; distillation never draws from these.
    """

    nfes: tuple[int, ...] = tuple(range(3, 11))
    samples: int = 2_000
    exact_samples: int = 1_000
    screen_samples: int = 32
    exact_nfe: int = 96
    accurate_nfe: int = 24
    batch: int = 125
    first_seed: int = 100_000

    def __post_init__(self) -> None:
        if not self.nfes or min(self.nfes) < 1:
            raise ValueError(f"nfe is {list(self.nfes)}, expected at least one number >= 1")
        if len(set(self.nfes)) < len(self.nfes):
            raise ValueError(f"nfe is {list(self.nfes)}, expected different numbers")
        if not 2 <= self.exact_samples <= self.samples:
            raise ValueError(
                f"exact_samples is {self.exact_samples}, expected 2 to samples ({self.samples})"
            )
        if not 0 <= self.screen_samples <= self.exact_samples:
            raise ValueError(
                f"screen_samples is {self.screen_samples}, expected 0 to exact_samples "
                f"({self.exact_samples})"
            )

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.samples)


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


def row_of(entry: Entry, measured: Measured, size: Size, floors: Floors) -> ResultRow:
    """The row of an entry; an RMSE of nan stands for no exact solution."""
    row: ResultRow = {
        "nfe": entry.nfe,
        "solver": entry.label,
        "learned": entry.learned,
        "size": size,
        "rmse": measured.rmse,
        **floors.figures(measured.sums),  # type: ignore[typeddict-item]
    }
    if entry.method is not None:
        row["method"] = entry.method
    return row


def rank(value: float | None) -> float:
    """``value`` to sort by; what is missing or no number comes last."""
    return math.inf if value is None or math.isnan(value) else value


def best(rows: Sequence[ResultRow], nfe: int, by: str) -> ResultRow | None:
    """The best handcrafted row of an nfe by a figure, among those on the most samples.

    A full measurement adds a distance to an RMSE that was there before, so by ``"rmse"`` both count.
    """
    pool = [row for row in rows if row["nfe"] == nfe and not row["learned"]]
    for sizes in (("full", "compared"),) if by == "rmse" else (("full",), ("compared",)):
        if certain := [row for row in pool if row.get("size") in sizes]:
            pool = certain
            break
    return min(pool, key=lambda row: rank(figure(row, by)), default=None)


def figure(row: ResultRow, by: str) -> float | None:
    """``row[by]``, such as ``"rmse"`` or ``"excess_accurate"``; None where it has none."""
    value = row.get(by)
    return value if isinstance(value, float) else None

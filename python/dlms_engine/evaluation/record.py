"""The comparison table: every handcrafted solver and the learned ones, at 3 to 10 evaluations.

Two figures a solver: the endpoint RMSE against the exact solution of the probability-flow ODE from
the same noise, and the Frechet distance (embedded features) to the data and to accurate samples of
other seeds, each also as its excess over the floor that a perfect solver would have at that number
of samples. All solvers are screened on few samples; the finalists of each nfe (the best two by
screening distance, the best by RMSE and every learned solver) are measured on many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..denoiser import Denoiser
from ..embedded import ReferenceStatistics
from .frechet import FeatureSums, frechet_distance
from .measure import Entry, Measured, Measurer
from .store import Store

SIDES = ("accurate", "data")


@dataclass(frozen=True)
class RecordSettings:
    """Sizes of the record.

    Attributes:
        nfes: evaluations compared.
        screen_samples: samples for RMSE and screening of every solver.
        samples: samples of the finalists' Frechet distance.
        exact_nfe: evaluations of the exact solution.
        accurate_nfe: evaluations of the accurate samples the distance is taken to.
        finalists: handcrafted solvers measured in full, by screening distance.
        batch: samples a run.
        compile: run the network through torch.compile.
    """

    nfes: tuple[int, ...] = tuple(range(3, 11))
    screen_samples: int = 2_000
    samples: int = 10_000
    exact_nfe: int = 200
    accurate_nfe: int = 64
    finalists: int = 2
    batch: int = 250
    compile: bool = False

    def __post_init__(self) -> None:
        if not self.nfes or min(self.nfes) < 1:
            raise ValueError(f"nfes is {self.nfes}, expected at least one number >= 1")
        if not 2 <= self.screen_samples <= self.samples:
            raise ValueError(
                f"screen_samples is {self.screen_samples} and samples {self.samples}, expected "
                "2 <= screen_samples <= samples"
            )


@dataclass(frozen=True)
class _Floors:
    """What a perfect solver has at a number of samples, and the sets distances are taken to."""

    references: Mapping[str, FeatureSums | ReferenceStatistics]
    values: Mapping[str, float]

    def figures(self, sums: FeatureSums) -> dict[str, float]:
        """``to_*`` and ``excess_*`` for each side."""
        found: dict[str, float] = {}
        for side in SIDES:
            value = _distance(sums, self.references[side])
            found[f"to_{side}"] = value
            found[f"excess_{side}"] = value - self.values[side]
        return found


def _distance(sums: FeatureSums, other: FeatureSums | ReferenceStatistics) -> float:
    """Infinite for samples that are not finite: such a solver comes last, it does not stop us."""
    if not bool(sums.outer.isfinite().all()):
        return math.inf
    return frechet_distance(other, sums)


def record(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics,
    shape: tuple[int, ...],
    handcrafted: Mapping[int, Sequence[Entry]],
    learned: Sequence[Entry],
    folder: Path,
    settings: RecordSettings | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures everything; killed and called again with the same arguments, it goes on.

    Args:
        denoiser: the model.
        features: module from samples ``[B, *shape]`` to features ``[B, F]``.
        reference: feature statistics of the data.
        shape: shape of one sample.
        handcrafted: nfe -> entries.
        learned: distilled solvers; those of an nfe that is not asked for are left out.
        folder: where the cache (``cache/``) and the results are written.

    Returns:
        the JSON-able record, also written to ``record.json``.
    """
    settings = settings or RecordSettings()
    learned = [entry for entry in learned if entry.nfe in settings.nfes]
    total = _work(settings, handcrafted, learned)
    bar = tqdm(total=total, unit="eval", unit_scale=True, disable=not progress, desc="record")
    measurer = _measurer(denoiser, features, shape, folder, settings, bar)
    with bar:
        result = _measure(measurer, reference, handcrafted, learned, settings, bar)
    path = folder / "record.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, allow_nan=True), encoding="utf-8")
    partial.replace(path)
    return result


def _work(
    settings: RecordSettings, handcrafted: Mapping[int, Sequence[Entry]], learned: Sequence[Entry]
) -> int:
    """Network evaluations (per sample) in all, repeated ones included."""
    accurate = 2 * settings.samples * settings.accurate_nfe
    exact = settings.screen_samples * settings.exact_nfe
    screened = settings.screen_samples * sum(
        entry.nfe for nfe in settings.nfes for entry in handcrafted[nfe]
    )
    screened += settings.screen_samples * sum(entry.nfe for entry in learned)
    full = settings.samples * sum(
        nfe * min(settings.finalists, len(handcrafted[nfe])) for nfe in settings.nfes
    )
    return accurate + exact + screened + full + settings.samples * sum(e.nfe for e in learned)


def _measure(
    measurer: Measurer,
    reference: ReferenceStatistics,
    handcrafted: Mapping[int, Sequence[Entry]],
    learned: Sequence[Entry],
    settings: RecordSettings,
    bar: tqdm[Any],
) -> dict[str, Any]:
    few, many = range(settings.screen_samples), range(settings.samples)
    others = range(settings.samples, 2 * settings.samples)
    bar.set_description("exact solutions")
    exact = measurer.endpoints(settings.exact_nfe, few)
    bar.set_description("accurate samples")
    accurate = Entry("accurate", measurer.accurate_table(settings.accurate_nfe))
    own = measurer.measure("accurate-own", [accurate], many, exact)[0]
    other = measurer.measure("accurate-other", [accurate], others)[0]
    screen = _floors(measurer.sums(exact), other.sums, reference)
    full = _floors(own.sums, other.sums, reference)
    rows: list[dict[str, Any]] = []
    for nfe in settings.nfes:
        entries = [*handcrafted[nfe], *(entry for entry in learned if entry.nfe == nfe)]
        bar.set_description(f"screening, {nfe} evaluations")
        found = measurer.measure(f"screen-{nfe}", entries, few, exact)
        fresh = [_row(e, m, screen) for e, m in zip(entries, found, strict=True)]
        finalists = _finalists(fresh, settings.finalists)
        bar.set_description(f"finalists, {nfe} evaluations")
        chosen = [entries[index] for index in finalists]
        more = len([e for e in chosen if not e.learned]) - settings.finalists
        bar.total = (bar.total or 0) + settings.samples * nfe * max(0, more)
        for index, m in zip(finalists, measurer.measure(f"full-{nfe}", chosen, many), strict=True):
            fresh[index]["full"] = full.figures(m.sums)
        rows.extend(fresh)
    return {
        "format": "dlms_engine.quality/1",
        "settings": asdict(settings),
        "torch": torch.__version__,
        "accurate_rmse": own.rmse,
        "floors": {"screen": dict(screen.values), "full": dict(full.values)},
        "rows": rows,
    }


def evaluate_one(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics,
    shape: tuple[int, ...],
    entry: Entry,
    folder: Path,
    settings: RecordSettings,
    *,
    progress: bool = True,
) -> dict[str, float]:
    """RMSE, distances and their excess of one sampler on ``settings.samples`` samples.

    Exact solutions and accurate samples are kept in ``folder`` for the next call.
    """
    count = settings.samples
    total = count * (settings.exact_nfe + settings.accurate_nfe + entry.nfe)
    bar = tqdm(total=total, unit="eval", unit_scale=True, disable=not progress, leave=False)
    measurer = _measurer(denoiser, features, shape, folder, settings, bar)
    with bar:
        bar.set_description("exact solutions (kept)")
        exact = measurer.endpoints(settings.exact_nfe, range(count))
        bar.set_description("accurate samples (kept)")
        accurate = Entry("accurate", measurer.accurate_table(settings.accurate_nfe))
        other = measurer.measure("accurate-other", [accurate], range(count, 2 * count))[0]
        bar.set_description(entry.label)
        found = measurer.measure(f"one-{entry.digest}", [entry], range(count), exact)[0]
    floors = _floors(measurer.sums(exact), other.sums, reference)
    return {"rmse": found.rmse, **floors.figures(found.sums)}


def _measurer(
    denoiser: Denoiser,
    features: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    settings: RecordSettings,
    bar: tqdm[Any],
) -> Measurer:
    network = denoiser.network
    if settings.compile and isinstance(network, nn.Module):
        network.compile()

    def advance(done: int) -> None:
        bar.update(done)

    store = Store(folder / "cache")
    return Measurer(denoiser, features, shape, store, batch=settings.batch, advance=advance)


def _floors(perfect: FeatureSums, other: FeatureSums, reference: ReferenceStatistics) -> _Floors:
    """Floors at the size of ``perfect``, the accurate samples of the seeds that are compared."""
    references: dict[str, FeatureSums | ReferenceStatistics] = {
        "accurate": other,
        "data": reference,
    }
    return _Floors(references, {side: _distance(perfect, references[side]) for side in SIDES})


def _row(entry: Entry, measured: Measured, floors: _Floors) -> dict[str, Any]:
    return {
        "nfe": entry.nfe,
        "solver": entry.label,
        "learned": entry.learned,
        "facts": entry.facts,
        "rmse": measured.rmse,
        "screen": floors.figures(measured.sums),
    }


def _finalists(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Indices: the best ``count`` handcrafted by distance, the best by RMSE, every learned one."""
    hand = [index for index, row in enumerate(rows) if not row["learned"]]
    by_distance = sorted(hand, key=lambda index: _rank(rows[index]["screen"]["to_accurate"]))
    by_rmse = sorted(hand, key=lambda index: _rank(rows[index]["rmse"]))
    learned = [index for index, row in enumerate(rows) if row["learned"]]
    return list(dict.fromkeys([*by_distance[:count], *by_rmse[:1], *learned]))


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def best(
    rows: Sequence[Mapping[str, Any]], nfe: int, *, learned: bool, by: str
) -> Mapping[str, Any] | None:
    """The best row of an nfe by ``"rmse"``, ``"accurate"`` or ``"data"`` (full figures first)."""
    pool = [row for row in rows if row["nfe"] == nfe and row["learned"] == learned]
    if by != "rmse":
        pool = [row for row in pool if "full" in row] or pool
    return min(pool, key=lambda row: _rank(figure(row, by)), default=None)


def figure(row: Mapping[str, Any], by: str) -> float:
    """RMSE, or the excess distance on the most samples there are."""
    if by == "rmse":
        return float(row["rmse"])
    return float(row.get("full", row["screen"])[f"excess_{by}"])

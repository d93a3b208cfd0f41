"""Every handcrafted solver beside learned ones: screened, the best compared, finalists in full.

Two figures a solver: the endpoint RMSE against the exact solution of the probability-flow ODE from
the same noise, and the Frechet distance to the data and to accurate samples of other seeds, each also
as its excess over the floor that a perfect solver would have at that number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...learners.start import Conditions
from ...models.denoiser import Denoiser
from ...models.embedded import ReferenceStatistics
from ..evaluation.frechet import require_torchmetrics
from .measure import Entry
from .result import Floors, Result, ResultRow, Sizes, rank, row_of
from .session import Session, handcrafted_entries, measuring


@dataclass(frozen=True)
class RecordSettings(Sizes):
    """Sizes of the record.

    Every handcrafted solver is screened on ``screen_samples``; the best and the learned ones are
    compared on ``exact_samples``, in distance too.

    Attributes:
        shortlist: handcrafted solvers compared, that many by RMSE and half of that by distance.
        full_nfes: evaluations at which the finalists' distances are taken on ``samples``.
        finalists: handcrafted solvers measured in full, by distance.
        compile: run the network through torch.compile.
    """

    samples: int = 10_000
    exact_samples: int = 2_000
    screen_samples: int = 64
    exact_nfe: int = 200
    accurate_nfe: int = 32
    batch: int = 250
    shortlist: int = 4
    full_nfes: tuple[int, ...] = (5, 10)
    finalists: int = 2
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.screen_samples < 2:
            raise ValueError(f"screen_samples is {self.screen_samples}, expected >= 2")


def record(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics | None,
    shape: tuple[int, ...],
    learned: Sequence[Entry],
    folder: Path,
    settings: RecordSettings | None = None,
    *,
    conditions: Conditions = None,
    progress: bool = True,
) -> Result:
    """Measures everything; killed and called again with the same arguments, it goes on.

    Args:
        denoiser: the model.
        features: module from samples ``[B, *shape]`` to features ``[B, F]``.
        reference: feature statistics of the data; None leaves the distance to the data out.
        shape: shape of one sample.
        learned: distilled solvers; those of an nfe that is not asked for are left out.
        conditions: the network's keyword arguments, ``learners.start.Conditions``; a sample's number
            is its seed.
        folder: where the cache (``cache/``) and the results are written.

    Returns:
        the JSON-able result, also written to ``record.json``.

    Raises:
        ImportError: torchmetrics is missing; raised before the work.
    """
    settings = settings or RecordSettings()
    require_torchmetrics()
    hand = {nfe: handcrafted_entries(denoiser.process, nfe) for nfe in settings.nfes}
    mine = {nfe: [entry for entry in learned if entry.nfe == nfe] for nfe in settings.nfes}
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=_work(settings, hand, mine), progress=progress,
        compiled=settings.compile,
    ) as (measurer, bar):  # fmt: skip
        session = Session(measurer, bar, reference, settings, folder / "record.json")
        for nfe in settings.nfes:
            session.add(*_rows(session, settings, nfe, hand[nfe], mine[nfe]))
    return session.result()


def _rows(
    session: Session,
    settings: RecordSettings,
    nfe: int,
    hand: Sequence[Entry],
    mine: Sequence[Entry],
) -> list[ResultRow]:
    """The rows of one nfe, each with the figures of the most samples it was measured on."""
    found = zip(hand, session.screened(nfe, hand), strict=True)
    floors = session.floors["screen"]
    rows = [row_of(entry, measured, "screen", floors) for entry, measured in found]
    session.bar.set_description(f"comparing, {nfe} evaluations")
    for index in shortlist(rows, settings.shortlist):
        rows[index] = session.row(hand[index], "compared")
    rows += [session.row(entry, "compared") for entry in mine]
    if nfe in settings.full_nfes:
        session.bar.set_description(f"finalists, {nfe} evaluations")
        for index in finalists(rows, settings.finalists):
            rows[index] = session.row([*hand, *mine][index], "full")
    return rows


def _work(
    settings: RecordSettings,
    hand: Mapping[int, Sequence[Entry]],
    mine: Mapping[int, Sequence[Entry]],
) -> int:
    """Network evaluations (per sample) in all, repeated ones included."""
    work = 2 * settings.samples * settings.accurate_nfe
    work += settings.exact_samples * settings.exact_nfe
    listed = settings.shortlist + (settings.shortlist + 1) // 2
    for nfe in settings.nfes:
        tables, learned = len(hand[nfe]), len(mine[nfe])
        each = settings.screen_samples * tables
        each += settings.exact_samples * (min(listed, tables) + learned)
        if nfe in settings.full_nfes:
            each += settings.samples * (min(settings.finalists, tables) + learned)
        work += nfe * each
    return work


def shortlist(rows: Sequence[ResultRow], count: int) -> list[int]:
    """Indices of the best ``count`` by RMSE and half as many by distance, without repetition."""
    by_rmse = sorted(range(len(rows)), key=lambda i: rank(rows[i]["rmse"]))
    by_distance = sorted(range(len(rows)), key=lambda i: rank(rows[i]["to_accurate"]))
    return list(dict.fromkeys([*by_rmse[:count], *by_distance[: (count + 1) // 2]]))


def finalists(rows: Sequence[ResultRow], count: int) -> list[int]:
    """Indices of the best ``count`` handcrafted by compared distance, and of every learned one."""
    listed = [i for i, row in enumerate(rows) if row["size"] == "compared"]
    hand = [i for i in listed if not rows[i]["learned"]]
    ranked = sorted(hand, key=lambda i: rank(rows[i]["to_accurate"]))
    return [*ranked[:count], *(i for i in listed if rows[i]["learned"])]


def evaluate_one(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics | None,
    shape: tuple[int, ...],
    entry: Entry,
    folder: Path,
    settings: Sizes,
    *,
    compiled: bool = False,
    distances: bool = True,
    conditions: Conditions = None,
    progress: bool = True,
) -> dict[str, float]:
    """RMSE, distances and their excess of one sampler on ``settings.samples`` samples.

    Exact solutions and accurate samples are kept in ``folder`` for the next call.

    Args:
        settings: of which ``samples``, ``exact_nfe``, ``accurate_nfe``, ``batch`` and ``first_seed``
            are read: every sample has an exact solution.
        reference: feature statistics of the data; None leaves the distance to the data out.
        compiled: run the network through torch.compile.
        distances: False measures the RMSE alone, which needs no further package.
        conditions: as for ``record``.
    """
    seeds = settings.seeds
    total = len(seeds) * (settings.exact_nfe + settings.accurate_nfe * distances + entry.nfe)
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=total, progress=progress, compiled=compiled,
    ) as (measurer, bar):  # fmt: skip
        bar.leave = False
        bar.set_description("exact solutions (kept)")
        exact = measurer.endpoints(settings.exact_nfe, seeds)
        bar.set_description(entry.label)
        found = measurer.measure(f"one-{entry.digest}", [entry], seeds, exact)[0]
        if not distances:
            return {"rmse": found.rmse}
        bar.set_description("accurate samples (kept)")
        accurate = Entry("accurate", measurer.accurate_table(settings.accurate_nfe))
        others = range(seeds.stop, seeds.stop + len(seeds))
        other = measurer.measure("accurate-other", [accurate], others)[0]
    floors = Floors.of(measurer.sums(exact), other.sums, reference)
    return {"rmse": found.rmse, **floors.figures(found.sums)}

"""The comparison table: every handcrafted solver and the learned ones, at 3 to 10 evaluations.

Two figures a solver: the endpoint RMSE against the exact solution of the probability-flow ODE from
the same noise, and the Frechet distance (embedded features) to the data and to accurate samples of
other seeds, each also as its excess over the floor that a perfect solver would have at that number
of samples. Every solver is screened on few samples, the best of each nfe and the learned ones are
compared on more, and at some nfe the finalists' distances are measured on the most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...learners.start import Conditions
from ...models.denoiser import Denoiser
from ...models.embedded import ReferenceStatistics
from ...support.files import write_text
from ...support.parallel import World
from ..evaluation.frechet import label_of_features
from .measure import Entry, Measurer
from .rows import Floors, finalists, measured_row, shortlist
from .store import Store


@dataclass(frozen=True)
class RecordSettings:
    """Sizes of the record.

    Attributes:
        nfes: evaluations compared.
        screen_samples: samples on which every solver is screened.
        compared_samples: samples for RMSE and distance of the shortlist and the learned solvers.
        samples: samples of the finalists' Frechet distance.
        shortlist: handcrafted solvers compared, that many by RMSE and half of that by distance.
        full_nfes: evaluations at which there are finalists.
        exact_nfe: evaluations of the exact solution.
        accurate_nfe: evaluations of the accurate samples the distance is taken to.
        finalists: handcrafted solvers measured in full, by screening distance.
        batch: samples a run.
        compile: run the network through torch.compile.
        first_seed: seed of the first sample.
    """

    nfes: tuple[int, ...] = tuple(range(3, 11))
    screen_samples: int = 64
    compared_samples: int = 2_000
    samples: int = 10_000
    shortlist: int = 4
    full_nfes: tuple[int, ...] = (5, 10)
    exact_nfe: int = 200
    accurate_nfe: int = 32
    finalists: int = 2
    batch: int = 250
    compile: bool = False
    first_seed: int = 100_000

    def __post_init__(self) -> None:
        if not self.nfes or min(self.nfes) < 1:
            raise ValueError(f"nfes is {self.nfes}, expected at least one number >= 1")
        if not 2 <= self.screen_samples <= self.compared_samples <= self.samples:
            raise ValueError(
                f"screen_samples is {self.screen_samples}, compared_samples {self.compared_samples} "
                f"and samples {self.samples}, expected 2 <= screen <= compared <= samples"
            )


def record(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics | None,
    shape: tuple[int, ...],
    handcrafted: Mapping[int, Sequence[Entry]],
    learned: Sequence[Entry],
    folder: Path,
    settings: RecordSettings | None = None,
    *,
    conditions: Conditions = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures everything; killed and called again with the same arguments, it goes on.

    Args:
        denoiser: the model.
        features: module from samples ``[B, *shape]`` to features ``[B, F]``.
        reference: feature statistics of the data; None leaves the distance to the data out.
        shape: shape of one sample.
        handcrafted: nfe -> entries.
        learned: distilled solvers; those of an nfe that is not asked for are left out.
        conditions: the network's keyword arguments, ``learners.start.Conditions``; a sample's number
            is its seed.
        folder: where the cache (``cache/``) and the results are written.

    Returns:
        the JSON-able record, also written to ``record.json``.
    """
    settings = settings or RecordSettings()
    learned = [entry for entry in learned if entry.nfe in settings.nfes]
    total = _work(settings, handcrafted, learned)
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=total, progress=progress, compiled=settings.compile,
    ) as (measurer, bar):  # fmt: skip
        result = _measure(measurer, reference, handcrafted, learned, settings, bar)
    if measurer.world.rank != 0:
        return result
    write_text(folder / "record.json", json.dumps(result, indent=1, allow_nan=True))
    return result


def _work(
    settings: RecordSettings, handcrafted: Mapping[int, Sequence[Entry]], learned: Sequence[Entry]
) -> int:
    """Network evaluations (per sample) in all, repeated ones included."""
    accurate = 2 * settings.samples * settings.accurate_nfe
    exact = settings.compared_samples * settings.exact_nfe
    screened = settings.screen_samples * sum(
        entry.nfe for nfe in settings.nfes for entry in handcrafted[nfe]
    )
    listed = settings.shortlist + (settings.shortlist + 1) // 2
    compared = settings.compared_samples * sum(
        nfe * min(listed, len(handcrafted[nfe])) for nfe in settings.nfes
    )
    compared += settings.compared_samples * sum(entry.nfe for entry in learned)
    full = sum(
        nfe * min(settings.finalists, len(handcrafted[nfe]))
        for nfe in settings.nfes
        if nfe in settings.full_nfes
    )
    full += sum(entry.nfe for entry in learned if entry.nfe in settings.full_nfes)
    return accurate + exact + screened + compared + settings.samples * full


def _measure(
    measurer: Measurer,
    reference: ReferenceStatistics | None,
    handcrafted: Mapping[int, Sequence[Entry]],
    learned: Sequence[Entry],
    settings: RecordSettings,
    bar: tqdm[Any],
) -> dict[str, Any]:
    first = settings.first_seed
    few, some, many = (
        range(first, first + count)
        for count in (settings.screen_samples, settings.compared_samples, settings.samples)
    )
    bar.set_description("exact solutions")
    exact = measurer.endpoints(settings.exact_nfe, some)
    bar.set_description("accurate samples")
    own, other = measurer.accurate(settings.accurate_nfe, many, exact)
    floors = {
        "screen": Floors.of(measurer.sums(exact[: len(few)]), other.sums, reference),
        "compared": Floors.of(measurer.sums(exact), other.sums, reference),
        "full": Floors.of(own.sums, other.sums, reference),
    }
    rows: list[dict[str, Any]] = []
    for nfe in settings.nfes:
        hand = handcrafted[nfe]
        mine = [entry for entry in learned if entry.nfe == nfe]
        bar.set_description(f"screening, {nfe} evaluations")
        found = measurer.measure(f"screen-{nfe}", hand, few, exact[: len(few)], share=True)
        fresh = [measured_row(e, m, "screen", floors) for e, m in zip(hand, found, strict=True)]
        listed = shortlist(fresh, settings.shortlist)
        bar.set_description(f"comparing, {nfe} evaluations")
        entries = [*(hand[index] for index in listed), *mine]
        found = measurer.measure(f"compare-{nfe}", entries, some, exact)
        own_rows = zip(mine, found[len(listed) :], strict=True)
        fresh += [measured_row(e, m, "compared", floors) for e, m in own_rows]
        for index, m in zip(listed, found, strict=False):
            fresh[index] |= measured_row(hand[index], m, "compared", floors)
        if nfe in settings.full_nfes:
            bar.set_description(f"finalists, {nfe} evaluations")
            all_entries = [*hand, *mine]
            chosen = finalists(fresh, settings.finalists)
            full = measurer.measure(f"full-{nfe}", [all_entries[i] for i in chosen], many)
            for index, m in zip(chosen, full, strict=True):
                fresh[index]["full"] = floors["full"].figures(m.sums)
        rows.extend(fresh)
    return {
        "format": "dlms_engine.quality/2",
        "settings": asdict(settings),
        "torch": torch.__version__,
        "accurate_rmse": own.rmse,
        "distance": label_of_features(measurer.features),
        "floors": {name: dict(floor.values) for name, floor in floors.items()},
        "rows": rows,
    }


def evaluate_one(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics | None,
    shape: tuple[int, ...],
    entry: Entry,
    folder: Path,
    settings: RecordSettings,
    *,
    distances: bool = True,
    conditions: Conditions = None,
    progress: bool = True,
) -> dict[str, float]:
    """RMSE, distances and their excess of one sampler on ``settings.samples`` samples.

    Exact solutions and accurate samples are kept in ``folder`` for the next call.

    Args:
        reference: feature statistics of the data; None leaves the distance to the data out.
        distances: False measures the RMSE alone, which needs no further package.
        conditions: as for ``record``.
    """
    count = settings.samples
    total = count * (settings.exact_nfe + settings.accurate_nfe * distances + entry.nfe)
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=total, progress=progress, compiled=settings.compile,
    ) as (measurer, bar):  # fmt: skip
        bar.leave = False
        bar.set_description("exact solutions (kept)")
        seeds = range(settings.first_seed, settings.first_seed + count)
        exact = measurer.endpoints(settings.exact_nfe, seeds)
        bar.set_description(entry.label)
        found = measurer.measure(f"one-{entry.digest}", [entry], seeds, exact)[0]
        if not distances:
            return {"rmse": found.rmse}
        bar.set_description("accurate samples (kept)")
        accurate = Entry("accurate", measurer.accurate_table(settings.accurate_nfe))
        others = range(seeds.stop, seeds.stop + count)
        other = measurer.measure("accurate-other", [accurate], others)[0]
    floors = Floors.of(measurer.sums(exact), other.sums, reference)
    return {"rmse": found.rmse, **floors.figures(found.sums)}


@contextmanager
def measuring(
    denoiser: Denoiser,
    features: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    conditions: Conditions,
    *,
    batch: int,
    total: int,
    progress: bool,
    compiled: bool = False,
) -> Iterator[tuple[Measurer, tqdm[Any]]]:
    """(what measures, its progress bar over ``total`` evaluations); its cache is in ``folder``."""
    network = denoiser.network
    if compiled and isinstance(network, nn.Module):
        network.compile()
    leads = World.current().rank == 0
    with tqdm(total=total, unit="eval", unit_scale=True, disable=not (progress and leads)) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        store = Store(folder / "cache")
        yield (
            Measurer(
                denoiser,
                features,
                shape,
                store,
                batch=batch,
                conditions=conditions,
                advance=advance,
            ),
            bar,
        )

"""The comparison itself: distil, measure the same seeds, one JSON-able result; resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...engine.sampler import Sampler
from ...learners.start.problem import Conditions, rows_of
from ...models.denoiser import Denoiser
from ...models.embedded import ReferenceStatistics
from ...solvers import handcrafted
from ...solvers.registry import label_of
from ...support.files import write_text
from ...support.parallel import World
from ..evaluation.frechet import label_of_features
from ..plots import side_by_side
from ..record.measure import Entry, Measurer
from ..record.record import measuring
from ..record.rows import Floors, rank
from .contestants import Contestant
from .distilled import Distilled, Workshop

_FORMAT = "dlms_engine.comparison/1"


@dataclass(frozen=True)
class CompareSettings:
    """Sizes of a comparison.

    Attributes:
        nfes: evaluations compared.
        budget: network calls (a pass of one sample in either direction) for each distillation.
        samples: samples of the Frechet distances.
        exact_samples: of these, the first ones whose exact solution gives the RMSE.
        exact_nfe, accurate_nfe: evaluations of the exact solutions and of the accurate samples.
        screen_samples: samples on which every handcrafted solver is tried; the best one by RMSE
            joins the comparison. 0 leaves the search out.
        shown: samples in the pictures.
        batch: samples at a time.
        first_seed: seed of the first sample; distillation never draws from these.
        training_seeds: seeds of the training noise; with several, each contestant is distilled
            once for each, and the table has the mean and its standard error.
        trajectories: start noises a distillation takes instead of what ``budget`` pays for; a
            closed form or a search takes its own number, ``auto`` the budget.
    """

    nfes: tuple[int, ...] = tuple(range(3, 11))
    budget: int = 100_000
    samples: int = 2_000
    exact_samples: int = 1_000
    exact_nfe: int = 96
    accurate_nfe: int = 24
    screen_samples: int = 32
    shown: int = 16
    batch: int = 125
    first_seed: int = 100_000
    training_seeds: tuple[int, ...] = (0,)
    trajectories: int | None = None

    def __post_init__(self) -> None:
        if not self.nfes or min(self.nfes) < 1:
            raise ValueError(f"nfes is {self.nfes}, expected at least one number >= 1")
        if not self.training_seeds or len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(
                f"training_seeds is {self.training_seeds}, expected different numbers, at least one"
            )
        if self.trajectories is not None and self.trajectories < 1:
            raise ValueError(f"trajectories is {self.trajectories}, expected >= 1 or None")
        if not 2 <= self.exact_samples <= self.samples:
            raise ValueError(
                f"exact_samples is {self.exact_samples}, expected 2 to samples ({self.samples})"
            )
        if not 0 <= self.screen_samples <= self.exact_samples:
            raise ValueError(
                f"screen_samples is {self.screen_samples}, expected 0 to exact_samples "
                f"({self.exact_samples})"
            )
        if not 0 <= self.shown <= self.exact_samples:
            raise ValueError(
                f"shown is {self.shown}, expected 0 to exact_samples ({self.exact_samples})"
            )

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.samples)


def compare(
    denoiser: Denoiser,
    features: nn.Module,
    reference: ReferenceStatistics | None,
    shape: tuple[int, ...],
    contestants: Sequence[Contestant],
    folder: Path,
    settings: CompareSettings | None = None,
    *,
    conditions: Conditions = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Distils every contestant at every count and measures it beside its handcrafted base.

    Killed and called again with the same arguments, it goes on: finished solvers, exact solutions
    and measurements lie in ``folder``.

    Args:
        denoiser: the model; its network is a module.
        features: module from samples ``[B, *shape]`` to features ``[B, F]``.
        reference: feature statistics of the data; None leaves the distance to the data out.
        shape: shape of one sample.
        contestants: who takes part.
        conditions: the network's keyword arguments, ``learners.start.Conditions``; a sample's number
            is its seed.

    Returns:
        the JSON-able result, also in ``compare.json``; ``samples-N.png`` beside it show the same
        seeds by every solver of N evaluations.

    Raises:
        ValueError: two contestants of one name, or several processes: distil with ``torchrun`` and
            measure with ``evaluate --record`` instead.
    """
    settings = settings or CompareSettings()
    labels = [contestant.label for contestant in contestants]
    if len(set(labels)) < len(labels):
        raise ValueError(f"contestants are {labels}, expected different names")
    if World.current().size > 1:
        raise ValueError("compare runs in one process: start it without torchrun")
    folder.mkdir(parents=True, exist_ok=True)
    total = _work(settings, contestants)
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=total, progress=progress,
    ) as (measurer, bar):  # fmt: skip
        run = _Run(
            denoiser, features, reference, shape, folder, settings, measurer, bar, conditions
        )
        for nfe in settings.nfes:
            run.measure(contestants, nfe)
            if settings.shown:
                side_by_side(run.panels, folder / f"samples-{nfe}.png", title=f"{nfe} evaluations")
    return run.result()


def _work(settings: CompareSettings, contestants: Sequence[Contestant]) -> int:
    """Network calls in all, about: solvers are screened with many evaluations in common."""
    fixed = 2 * settings.samples * settings.accurate_nfe
    fixed += settings.exact_samples * settings.exact_nfe
    distilled = len(contestants) * len(settings.training_seeds)
    entries = len(contestants) + distilled + 1
    measured = sum(settings.nfes) * settings.samples * entries
    return fixed + measured + len(settings.nfes) * distilled * settings.budget


class _Run:
    """What all counts share: the model, the seeds, the exact solutions and the floors."""

    def __init__(
        self,
        denoiser: Denoiser,
        features: nn.Module,
        reference: ReferenceStatistics | None,
        shape: tuple[int, ...],
        folder: Path,
        settings: CompareSettings,
        measurer: Measurer,
        bar: tqdm[Any],
        conditions: Conditions,
    ) -> None:
        self.settings = settings
        self.panels: dict[str, Tensor] = {}
        self._denoiser = denoiser
        self._shape = shape
        self._process = denoiser.process
        self._bar = bar

        def advance(done: int) -> None:
            bar.update(done)

        self._measurer = measurer
        self._rows: list[dict[str, Any]] = []
        self._file = folder / "compare.json"
        solvers = folder / "solvers"
        solvers.mkdir(exist_ok=True)
        self._workshop = Workshop(
            denoiser, features, shape, solvers, settings.budget, advance, conditions,
            settings.trajectories,
        )  # fmt: skip
        bar.set_description("exact solutions")
        few = settings.seeds[: settings.exact_samples]
        self._exact = self._measurer.endpoints(settings.exact_nfe, few)
        bar.set_description("accurate samples")
        own, other = self._measurer.accurate(settings.accurate_nfe, settings.seeds)
        self._floors = Floors.of(own.sums, other.sums, reference)

    def result(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "torch": torch.__version__,
            "distance": label_of_features(self._measurer.features),
            "floors": dict(self._floors.values),
            "rows": self._rows,
        }

    def measure(self, contestants: Sequence[Contestant], nfe: int) -> None:
        """All solvers of one count; after each, ``compare.json`` holds what there is."""
        self.panels = {"accurate": self._exact[: self.settings.shown]}
        hand: set[str] = set()
        for seed in self.settings.training_seeds:
            for contestant in contestants:
                base = self._base(contestant, nfe)
                if base is not None:
                    self._handcrafted(base, hand)
                self._add(self._learned(contestant, nfe, base, seed))
        if self.settings.screen_samples:
            self._handcrafted(self._best_handcrafted(nfe), hand)

    def _handcrafted(self, entry: Entry, measured: set[str]) -> None:
        if entry.digest not in measured:
            measured.add(entry.digest)
            self._add(self._row(entry))

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        write_text(self._file, json.dumps(self.result(), indent=1))

    def _best_handcrafted(self, nfe: int) -> Entry:
        self._bar.set_description(f"{nfe} evaluations: handcrafted")
        entries = [Entry(label, table) for label, table in handcrafted(self._process, nfe)]
        few = self.settings.seeds[: self.settings.screen_samples]
        exact = self._exact[: len(few)]
        found = self._measurer.measure(f"screen-{nfe}", entries, few, exact, share=True)
        ranked = sorted(range(len(found)), key=lambda i: rank(found[i].rmse))
        return entries[ranked[0]]

    def _base(self, contestant: Contestant, nfe: int) -> Entry | None:
        if contestant.base is None:
            return None
        try:
            table = contestant.base.table(self._process, nfe)
        except ValueError:  # two evaluations a step reach every other count
            return None
        return Entry(label_of(table, contestant.base.grid), table)

    def _learned(
        self, contestant: Contestant, nfe: int, base: Entry | None, seed: int
    ) -> dict[str, Any]:
        self._bar.set_description(f"{nfe} evaluations: {contestant.label}")
        beside = {"base": None if base is None else base.label, "seed": seed}
        spent = self._bar.n
        try:
            solver = self._workshop.distilled(contestant, nfe, seed)
        except ValueError as refusal:
            row = {"nfe": nfe, "solver": contestant.label, "learned": True}
            return {**row, "method": contestant.method, "refused": str(refusal), **beside}
        finally:  # a closed form takes less than its budget, a solver of an earlier run nothing
            took = self._bar.n - spent
            self._bar.total = (self._bar.total or 0) + max(0, took - self.settings.budget)
            self._bar.update(max(0, self.settings.budget - took))
        entry = Entry(contestant.label, solver.policy, learned=True)
        return {**self._row(entry), "method": contestant.method, **_cost(solver), **beside}

    def _row(self, entry: Entry) -> dict[str, Any]:
        settings = self.settings
        found = self._measurer.measure(f"one-{entry.digest}", [entry], settings.seeds, self._exact)[
            0
        ]
        shown = list(settings.seeds[: settings.shown])
        if shown and entry.label not in self.panels:  # of several seeds, the first
            self.panels[entry.label] = Sampler(self._denoiser, entry.policy).sample(
                shown, self._shape, **rows_of(self._measurer.conditions, shown)
            )
        return {
            "nfe": entry.nfe,
            "solver": entry.label,
            "learned": entry.learned,
            "rmse": found.rmse,
            **self._floors.figures(found.sums),
        }


def _cost(solver: Distilled) -> dict[str, Any]:
    return {
        "trajectories": solver.trajectories,
        "forward": solver.forward,
        "backward": solver.backward,
        "seconds": solver.seconds,
    }

"""The comparison itself: distil, measure the same seeds, one JSON-able result; resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ...engine.sampler import Sampler
from ...learners.start.problem import Conditions, rows_of
from ...models.denoiser import Denoiser
from ...models.embedded import ReferenceStatistics
from ...solvers.registry import label_of
from ...support.parallel import World
from ..evaluation.frechet import require_torchmetrics
from ..plots import is_image, new_figure, side_by_side
from .budget import countable
from .contestants import Contestant
from .distilled import Workshop
from .measure import Entry
from .result import Result, ResultRow, Sizes, rank
from .session import Session, handcrafted_entries, measuring


@dataclass(frozen=True)
class CompareSettings(Sizes):
    """Sizes of a comparison; with ``screen_samples`` 0 the best handcrafted solver is not sought.

    Attributes:
        budget: network calls (a pass of one sample in either direction) for each distillation.
        shown: samples in the pictures; of samples that are no images there are none.
        training_seeds: seeds of the training noise; with several, each contestant is distilled
            once for each, and the table has the mean and its standard error.
        trajectories: start noises a distillation takes instead of what ``budget`` pays for; a
            closed form or a search takes its own number, ``auto`` the budget.
    """

    budget: int = 100_000
    shown: int = 16
    training_seeds: tuple[int, ...] = (0,)
    trajectories: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.training_seeds or len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(
                f"training_seeds is {self.training_seeds}, expected different numbers, at least one"
            )
        if self.trajectories is not None and self.trajectories < 1:
            raise ValueError(f"trajectories is {self.trajectories}, expected >= 1 or None")
        if not 0 <= self.shown <= self.exact_samples:
            raise ValueError(
                f"shown is {self.shown}, expected 0 to exact_samples ({self.exact_samples})"
            )


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
) -> Result:
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
        ImportError: torchmetrics or matplotlib is missing; raised before the work.
    """
    settings = settings or CompareSettings()
    if not is_image(shape):
        settings = replace(settings, shown=0)
    labels = [contestant.label for contestant in contestants]
    if len(set(labels)) < len(labels):
        raise ValueError(f"contestants are {labels}, expected different names")
    if World.current().size > 1:
        raise ValueError("compare runs in one process: start it without torchrun")
    require_torchmetrics()
    new_figure(1, 1)  # pictures of samples and of quality come last
    denoiser = countable(denoiser)
    solvers = folder / "solvers"
    solvers.mkdir(parents=True, exist_ok=True)
    total = _work(settings, contestants)
    with measuring(
        denoiser, features, shape, folder, conditions,
        batch=settings.batch, total=total, progress=progress,
    ) as (measurer, bar):  # fmt: skip
        session = Session(measurer, bar, reference, settings, folder / "compare.json")
        workshop = Workshop(
            denoiser, features, shape, solvers, settings.budget, measurer.advance, conditions,
            settings.trajectories,
        )  # fmt: skip
        run = _Run(session, workshop, settings)
        for nfe in settings.nfes:
            run.measure(contestants, nfe)
            if settings.shown:
                side_by_side(run.panels, folder / f"samples-{nfe}.png", title=f"{nfe} evaluations")
    return session.result()


def _work(settings: CompareSettings, contestants: Sequence[Contestant]) -> int:
    """Network calls in all, about: solvers are screened with many evaluations in common."""
    fixed = 2 * settings.samples * settings.accurate_nfe
    fixed += settings.exact_samples * settings.exact_nfe
    distilled = len(contestants) * len(settings.training_seeds)
    entries = len(contestants) + distilled + 1
    measured = sum(settings.nfes) * settings.samples * entries
    return fixed + measured + len(settings.nfes) * distilled * settings.budget


class _Run:
    """Contestants of one count after another, on what all counts share."""

    def __init__(self, session: Session, workshop: Workshop, settings: CompareSettings) -> None:
        self.panels: dict[str, Tensor] = {}
        self._session = session
        self._workshop = workshop
        self._settings = settings
        self._denoiser = workshop.denoiser

    def measure(self, contestants: Sequence[Contestant], nfe: int) -> None:
        """All solvers of one count; after each, ``compare.json`` holds what there is."""
        self.panels = {"accurate": self._session.exact[: self._settings.shown]}
        hand: set[str] = set()
        for seed in self._settings.training_seeds:
            for contestant in contestants:
                base = self._base(contestant, nfe)
                if base is not None:
                    self._handcrafted(base, hand)
                self._session.add(self._learned(contestant, nfe, base, seed))
        if self._settings.screen_samples:
            self._handcrafted(self._best_handcrafted(nfe), hand)

    def _handcrafted(self, entry: Entry, measured: set[str]) -> None:
        if entry.digest not in measured:
            measured.add(entry.digest)
            self._session.add(self._row(entry))

    def _best_handcrafted(self, nfe: int) -> Entry:
        entries = handcrafted_entries(self._denoiser.process, nfe)
        found = self._session.screened(nfe, entries)
        return min(zip(entries, found, strict=True), key=lambda held: rank(held[1].rmse))[0]

    def _base(self, contestant: Contestant, nfe: int) -> Entry | None:
        if contestant.base is None:
            return None
        try:
            table = contestant.base.table(self._denoiser.process, nfe)
        except ValueError:  # two evaluations a step reach every other count
            return None
        return Entry(label_of(table, contestant.base.grid), table)

    def _learned(
        self, contestant: Contestant, nfe: int, base: Entry | None, seed: int
    ) -> ResultRow:
        bar, budget = self._session.bar, self._workshop.budget
        bar.set_description(f"{nfe} evaluations: {contestant.label}")
        beside: ResultRow = {
            "nfe": nfe,
            "solver": contestant.label,
            "learned": True,
            "method": contestant.method,
            "base": None if base is None else base.label,
            "seed": seed,
        }
        spent = bar.n
        try:
            solver = self._workshop.distilled(contestant, nfe, seed)
        except ValueError as refusal:
            beside["refused"] = str(refusal)
            return beside
        finally:  # a closed form takes less than its budget, a solver of an earlier run nothing
            took = bar.n - spent
            bar.total = (bar.total or 0) + max(0, took - budget)
            bar.update(max(0, budget - took))
        entry = Entry(contestant.label, solver.policy, contestant.method)
        return cast(ResultRow, {**beside, **self._row(entry), **solver.cost})

    def _row(self, entry: Entry) -> ResultRow:
        row = self._session.row(entry, "full")
        shown = self._settings.seeds[: self._settings.shown]
        if shown and entry.label not in self.panels:  # of several seeds, the first
            measurer = self._session.measurer
            self.panels[entry.label] = Sampler(self._denoiser, entry.policy).sample(
                list(shown), measurer.shape, **rows_of(measurer.conditions, shown)
            )
        return row

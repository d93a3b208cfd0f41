"""What all solvers of a comparison share: the seeds, their exact solutions, the floors, the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...learners.start import Conditions
from ...models.denoiser import Denoiser
from ...models.embedded import ReferenceStatistics
from ...processes import Process
from ...solvers import handcrafted
from ...support.files import write_text
from ...support.parallel import World
from ...support.values import json_value
from ..evaluation.frechet import label_of_features
from ..plots import is_image
from .measure import Entry, Measured, Measurer
from .result import FORMAT, Floors, Result, ResultRow, Size, Sizes, row_of
from .store import Store


class Session:
    """Measures entries on the same seeds and writes their rows to ``file`` as they come.

    Args:
        bar: told what is under way.
        reference: feature statistics of the data; None leaves the distance to the data out.
    """

    def __init__(
        self,
        measurer: Measurer,
        bar: tqdm[Any],
        reference: ReferenceStatistics | None,
        sizes: Sizes,
        file: Path,
    ) -> None:
        self.measurer, self.bar, self._sizes, self._file = measurer, bar, sizes, file
        self._rows: list[ResultRow] = []
        bar.set_description("exact solutions")
        self.exact = measurer.endpoints(sizes.exact_nfe, self.seeds("compared"))
        bar.set_description("accurate samples")
        own, other = measurer.accurate(sizes.accurate_nfe, sizes.seeds, self.exact)
        self._accurate_rmse = own.rmse
        perfect: dict[Size, Any] = {"compared": measurer.sums(self.exact), "full": own.sums}
        few = self.exact[: sizes.screen_samples]
        if len(few) >= 2:  # a covariance needs two
            perfect["screen"] = measurer.sums(few)
        self.floors = {
            size: Floors.of(sums, other.sums, reference) for size, sums in perfect.items()
        }

    def seeds(self, size: Size) -> range:
        sizes = self._sizes
        counts = {"screen": sizes.screen_samples, "compared": sizes.exact_samples}
        return sizes.seeds[: counts.get(size, sizes.samples)]

    def screened(self, nfe: int, entries: Sequence[Entry]) -> list[Measured]:
        """All tables of one nfe on the first few seeds; evaluations that they share are made once."""
        self.bar.set_description(f"{nfe} evaluations: handcrafted")
        few = self.seeds("screen")
        exact = self.exact[: len(few)]
        return self.measurer.measure(f"screen-{nfe}", entries, few, exact, share=True)

    def row(self, entry: Entry, size: Size) -> ResultRow:
        name = f"{size}-{entry.digest}"
        found = self.measurer.measure(name, [entry], self.seeds(size), self.exact)[0]
        return row_of(entry, found, size, self.floors[size])

    def add(self, *rows: ResultRow) -> None:
        self._rows.extend(rows)
        if self.measurer.world.rank == 0:
            write_text(self._file, json.dumps(json_value(self.result()), indent=1))

    def result(self) -> Result:
        """What there is; what is not finite is null in the file."""
        return {
            "format": FORMAT,
            "settings": json.loads(json.dumps(asdict(self._sizes))),
            "torch": torch.__version__,
            "distance": label_of_features(self.measurer.features),
            "accurate_rmse": self._accurate_rmse,
            "floors": {size: dict(floor.values) for size, floor in self.floors.items()},
            "rows": self._rows,
        }


def handcrafted_entries(process: Process, nfe: int) -> list[Entry]:
    """Every handcrafted solver, grid and analytical first step of that cost."""
    return [Entry(label, table) for label, table in handcrafted(process, nfe)]


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

        yield (
            Measurer(
                denoiser,
                features,
                shape,
                Store(folder / "cache"),
                batch=batch,
                conditions=conditions,
                advance=advance,
                clamp=is_image(shape),
            ),
            bar,
        )

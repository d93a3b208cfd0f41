"""Published tables as data (``published.json``): a row a solver, its figures, and what makes it here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...learners.registry import preset
from ...processes import Process
from ...solvers.registry import handcrafted_table, make_solver, parse_label
from ...solvers.table import SolverTable


@dataclass(frozen=True)
class Published:
    """A figure of a paper and, where it says so, the standard deviation over its runs."""

    value: float
    spread: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


@dataclass(frozen=True)
class TableRow:
    """One solver of a published table.

    Attributes:
        name: as the paper calls it.
        figures: evaluations -> FID; what the paper leaves out is left out.
        solver: label of the handcrafted solver (``solvers.registry``), or None.
        preset: preset of the learned solver (``learners.presets.papers``), or None. With neither, the
            row is of a method that is not here and stands beside the others as published.
        settings: what differs from the preset.
        threshold: quantile of dynamic thresholding of data predictions, where the row was made with it.
        power: times t_i = t_min + (1 - i / N)^power (t_max - t_min), LD3's Eq. 8, for a grid's name.
    """

    name: str
    figures: Mapping[int, Published]
    solver: str | None = None
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = None
    power: int | None = None

    @property
    def runs_here(self) -> bool:
        return self.solver is not None or self.preset is not None

    @property
    def learner(self) -> dict[str, Any]:
        """``distill``'s keyword arguments: those of the preset, changed by ``settings``."""
        assert self.preset is not None
        return preset(self.preset, **self.settings)

    def table(self, process: Process, nfe: int) -> SolverTable:
        """The handcrafted solver at ``nfe`` evaluations.

        Raises:
            ValueError: it has none of that cost.
        """
        assert self.solver is not None
        said = parse_label(self.solver)
        if self.power is None:
            return handcrafted_table(
                process, said.method, nfe, grid=said.grid, afs=said.afs, **said.options
            )
        return make_solver(
            said.method, process, _power_grid(process, nfe, self.power), **said.options
        )


@dataclass(frozen=True)
class Panel:
    """The part of a table that is about one data set."""

    data: str
    nfes: tuple[int, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper.

    Attributes:
        name: what the command calls it.
        paper, number, title: where it stands.
        runs: distillations with seeds 0, 1, ... that a learned row is the mean of.
        panels: data set -> its part.
    """

    name: str
    paper: str
    number: str
    title: str
    runs: int
    panels: Mapping[str, Panel]

    def panel(self, data: str | None) -> Panel:
        """The part about ``data``; the only one for None.

        Raises:
            ValueError: there is no such part, or there are several to choose from.
        """
        if data is None and len(self.panels) == 1:
            return next(iter(self.panels.values()))
        if data is None or data not in self.panels:
            raise ValueError(
                f"data is {data!r}, {self.name} has {', '.join(self.panels)}: give one of them as --data"
            )
        return self.panels[data]


@cache
def published_tables() -> dict[str, PublishedTable]:
    """Every table by its name."""
    path = Path(__file__).with_name("published.json")
    held = json.loads(path.read_text(encoding="utf-8"))
    return {name: _table(name, entry, held["papers"]) for name, entry in held["tables"].items()}


def published_table(name: str) -> PublishedTable:
    """The table called ``name``.

    Raises:
        ValueError: there is none.
    """
    known = published_tables()
    if name not in known:
        raise ValueError(f"table is {name!r}, expected one of {', '.join(known)}")
    return known[name]


def _table(name: str, held: Mapping[str, Any], papers: Mapping[str, str]) -> PublishedTable:
    panels = {
        data: Panel(
            data,
            tuple(panel["nfe"]),
            tuple(_row(row, tuple(panel["nfe"])) for row in panel["rows"]),
        )
        for data, panel in held["panels"].items()
    }
    return PublishedTable(
        name, papers[held["paper"]], held["table"], held["title"], held["runs"], panels
    )


def _row(held: Mapping[str, Any], nfes: tuple[int, ...]) -> TableRow:
    rest = {key: value for key, value in held.items() if key not in ("row", "fid")}
    words = held["fid"].split()
    figures = {nfe: _figure(word) for nfe, word in zip(nfes, words, strict=True) if word != "-"}
    return TableRow(held["row"], figures, **rest)


def _figure(word: str) -> Published:
    value, _, spread = word.partition("±")
    return Published(float(value), float(spread) if spread else None)


def _power_grid(process: Process, steps: int, power: int) -> Tensor:
    """float64 ``[steps + 1]`` times, falling."""
    share = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu") ** power
    return process.t_min + share * (process.t_max - process.t_min)

"""A handcrafted solver by name and cost: as many steps as make exactly that many evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import grids
from ..processes import Process
from ..table import SolverTable
from .registry import make_solver, standard_grids


def grid_maker(process: Process, name: str) -> Callable[[Process, int], Tensor]:
    """A grid by its function's name or by its label in comparison tables.

    Raises:
        ValueError: unknown name, or a grid that ``process`` does not have.
    """
    known: dict[str, Callable[[Process, int], Tensor]] = {
        **grids.GRIDS,
        "time_quadratic": lambda p, steps: grids.time_uniform(p, steps, 2.0),
        **standard_grids(process),
    }
    if name not in known:
        raise ValueError(f"grid is {name!r}, expected one of {', '.join(sorted(known))}")
    return known[name]


def handcrafted_table(
    process: Process,
    method: str,
    nfe: int,
    *,
    grid: str = "polynomial",
    order: int | None = None,
    afs: str = "off",
    **options: Any,
) -> SolverTable:
    """The named solver with exactly ``nfe`` evaluations, on as many steps as that takes.

    Raises:
        ValueError: unknown name or option, or no number of steps gives that nfe.
    """
    if afs not in ("off", "dockhorn", "zero"):
        raise ValueError(f"afs is {afs!r}, expected off, dockhorn or zero")
    if order is not None:
        options["order"] = order
    options["afs"] = False if afs == "off" else afs
    make_grid = grid_maker(process, grid)
    possible: set[int] = set()
    for steps in range(2 if afs != "off" else 1, nfe + 3):
        table = make_solver(method, process, make_grid(process, steps), **options)
        if table.nfe == nfe:
            return table
        possible.add(table.nfe)
    near = sorted(possible, key=lambda cost: abs(cost - nfe))[:2]
    raise ValueError(f"{method} cannot make exactly {nfe} evaluations; near it: {sorted(near)}")


def label_of(table: SolverTable, grid: str) -> str:
    """``ipndm4/polynomial/afs-dockhorn``: name, order, grid, analytical first step."""
    parts = [f"{table.name}{table.options.get('order', '')}", grid]
    if table.options.get("afs"):
        parts.append(f"afs-{table.options['afs']}")
    return "/".join(parts)

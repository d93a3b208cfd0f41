"""Solvers by name, and every sensible handcrafted table for a number of evaluations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..processes import Process, RectifiedFlow, VPDiscrete
from ..processes.grids import GRIDS, logsnr, polynomial, shifted, time_uniform
from ..tables.file import register_method
from ..tables.table import SolverTable
from .common import Afs
from .ddim import ddim
from .deis import deis
from .dpm_solver import dpm_solver_2, dpm_solver_pp, dpm_solver_pp_2s, heun
from .ipndm import ipndm, ipndm_v
from .unipc import unipc

Grid = Callable[[Process, int], Tensor]


@dataclass(frozen=True)
class Solver:
    """A maker, how many evaluations its steps cost, and the settings worth comparing.

    ``variants`` maps a short label to keyword arguments of ``make``.
    """

    make: Callable[..., SolverTable]
    evaluations_per_step: int
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Keyword arguments ``make`` takes."""
        return tuple(
            name
            for name, parameter in inspect.signature(self.make).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, 1, {"ddim": {}}),
    "ipndm": Solver(ipndm, 1, {f"ipndm{p}": {"order": p} for p in (2, 3, 4)}),
    "ipndm_v": Solver(ipndm_v, 1, {f"ipndm_v{p}": {"order": p} for p in (2, 3, 4)}),
    "deis": Solver(deis, 1, {f"deis{p}": {"order": p} for p in (2, 3, 4)}),
    "dpm_solver_pp": Solver(
        dpm_solver_pp,
        1,
        {
            f"dpm++{p}m{'' if low else '-flat'}": {"order": p, "lower_order_final": low}
            for p in (2, 3)
            for low in (True, False)
        }
        | {"dpm++3m-exact": {"order": 3, "exact": True}},
    ),
    "unipc": Solver(
        unipc,
        1,
        {
            f"unipc{p}-{v}{'' if low else '-flat'}": {
                "order": p,
                "variant": v,
                "lower_order_final": low,
            }
            for p in (2, 3)
            for v in ("bh1", "bh2")
            for low in (True, False)
        },
    ),
    "dpm_solver_pp_2s": Solver(dpm_solver_pp_2s, 2, {"dpm++2s": {}}),
    "dpm_solver_2": Solver(dpm_solver_2, 2, {"dpm2": {}}),
    "heun": Solver(heun, 2, {"heun": {}}),
}
for _name in SOLVERS:
    register_method(_name)


def register_solver(name: str, solver: Solver) -> None:
    """Adds a solver of another package, under every command.

    Raises:
        ValueError: a solver of that name is there already.
    """
    if name in SOLVERS:
        raise ValueError(f"there is a solver {name!r} already")
    SOLVERS[name] = solver
    register_method(name)


def make_solver(name: str, process: Process, grid: Tensor, **options: Any) -> SolverTable:
    """The table of solver ``name``.

    Raises:
        ValueError: unknown name or option, or a value the maker rejects.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}, expected one of {sorted(SOLVERS)}")
    solver = SOLVERS[name]
    unknown = sorted(set(options) - set(solver.options))
    if unknown:
        raise ValueError(f"solver {name!r} has no option {unknown}, expected {solver.options}")
    return solver.make(process, grid, **options)


def standard_grids(process: Process) -> dict[str, Grid]:
    """The handcrafted grids that exist for ``process``, by label."""
    grids: dict[str, Grid] = {"uniform": time_uniform}
    if isinstance(process, RectifiedFlow):
        return {**grids, "shift3": shifted}
    grids["quadratic"] = lambda p, n: time_uniform(p, n, 2.0)
    grids["poly7"] = polynomial
    if math.isfinite(float(process.lambda_(process.t_min))):
        grids["logsnr"] = logsnr
    if isinstance(process, VPDiscrete):
        grids["index"] = grids.pop("uniform")
    return grids


def handcrafted(
    process: Process, nfe: int, *, afs: tuple[Afs, ...] = (False, "dockhorn")
) -> list[tuple[str, SolverTable]]:
    """Every solver x grid x AFS that costs exactly ``nfe`` evaluations, as (label, table).

    The number of steps follows from the cost: one step more with an analytical first step, half
    as many for two-stage solvers, which exist only at the counts they can reach. Variants that
    give the same numbers at this ``nfe`` (order 4 in two steps, say) are listed once.
    """
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe is {nfe!r}, expected an integer >= 1")
    found = list[tuple[str, SolverTable]]()
    for grid_label, grid in standard_grids(process).items():
        for kind in afs:
            tables = list[SolverTable]()
            for label, table in _tables(process, nfe, grid, kind):
                if any(_same(table, other) for other in tables):
                    continue
                tables.append(table)
                suffix = "" if kind is False else f"/afs-{table.options['afs']}"
                found.append((f"{label}/{grid_label}{suffix}", table))
    return found


def _tables(process: Process, nfe: int, grid: Grid, afs: Afs) -> Iterator[tuple[str, SolverTable]]:
    for solver in SOLVERS.values():
        # infinite ends and AFS each save at most one evaluation
        base = math.ceil(nfe / solver.evaluations_per_step)
        for steps in range(base, base + 3):
            if steps - (afs is not False) < 1:
                continue
            times = grid(process, steps)
            variants = iter(solver.variants.items())
            label, options = next(variants)
            table = solver.make(process, times, afs=afs, **options)
            if table.nfe != nfe:
                continue
            yield label, table
            for label, options in variants:
                yield label, solver.make(process, times, afs=afs, **options)
            break


def _same(left: SolverTable, right: SolverTable) -> bool:
    pairs = ((left.a, right.a), (left.b, right.b), (left.times, right.times))
    return left.prediction == right.prediction and all(
        one.shape == other.shape and bool((one - other).abs().max() < 1e-13) for one, other in pairs
    )


def grid_maker(process: Process, name: str) -> Callable[[Process, int], Tensor]:
    """A grid by its function's name or by its label in comparison tables.

    Raises:
        ValueError: unknown name, or a grid that ``process`` does not have.
    """
    known: dict[str, Callable[[Process, int], Tensor]] = {
        **GRIDS,
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

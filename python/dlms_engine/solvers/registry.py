"""Solvers by name, and every sensible handcrafted table for a number of evaluations."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..processes import Process, RectifiedFlow, VPDiscrete
from ..processes.grids import GRIDS, default_grid, named_grid
from .common import Afs
from .ddim import ddim
from .deis import deis
from .dpm_solver import dpm_solver_2, dpm_solver_pp, dpm_solver_pp_2s, heun
from .file import register_method
from .ipndm import ipndm, ipndm_v
from .table import SolverTable
from .unipc import unipc

Grid = Callable[[Process, int], Tensor]


@dataclass(frozen=True)
class Solver:
    """A maker, how many evaluations its steps cost, and the options worth comparing.

    ``variants`` are keyword arguments of ``make`` beside the grid and ``afs``.
    """

    make: Callable[..., SolverTable]
    evaluations_per_step: int
    variants: tuple[dict[str, Any], ...] = ({},)

    @property
    def options(self) -> tuple[str, ...]:
        """Keyword arguments ``make`` takes."""
        return tuple(self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """Keyword argument of ``make`` -> its default."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.make).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }


def _each(**values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Every combination of the values, the last name fastest."""
    return tuple(
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    )


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, 1),
    "ipndm": Solver(ipndm, 1, _each(order=(2, 3, 4))),
    "ipndm_v": Solver(ipndm_v, 1, _each(order=(2, 3, 4))),
    "deis": Solver(deis, 1, _each(order=(2, 3, 4))),
    "dpm_solver_pp": Solver(
        dpm_solver_pp,
        1,
        (*_each(order=(2, 3), lower_order_final=(True, False)), {"order": 3, "exact": True}),
    ),
    "unipc": Solver(
        unipc, 1, _each(order=(2, 3), variant=("bh1", "bh2"), lower_order_final=(True, False))
    ),
    "dpm_solver_pp_2s": Solver(dpm_solver_pp_2s, 2),
    "dpm_solver_2": Solver(dpm_solver_2, 2),
    "heun": Solver(heun, 2),
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
    """The handcrafted grids that exist for ``process``, by their names in ``grids.GRIDS``."""
    names = ["time_uniform", "time_quadratic", "shifted"]
    if not isinstance(process, RectifiedFlow):
        first = "discrete" if isinstance(process, VPDiscrete) else "time_uniform"
        names = [first, "time_quadratic", "polynomial"]
        if math.isfinite(float(process.lambda_(process.t_min))):
            names.append("logsnr")
    return {name: GRIDS[name] for name in names}


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
    for name, grid in standard_grids(process).items():
        for kind in afs:
            tables = list[SolverTable]()
            for table in _tables(process, nfe, grid, kind):
                if any(_same(table, other) for other in tables):
                    continue
                tables.append(table)
                found.append((label_of(table, name), table))
    return found


def _tables(process: Process, nfe: int, grid: Grid, afs: Afs) -> Iterator[SolverTable]:
    for solver in SOLVERS.values():
        # infinite ends and AFS each save at most one evaluation
        base = math.ceil(nfe / solver.evaluations_per_step)
        for steps in range(base, base + 3):
            if steps - (afs is not False) < 1:
                continue
            times = grid(process, steps)
            first, *others = solver.variants
            table = solver.make(process, times, afs=afs, **first)
            if table.nfe != nfe:
                continue
            yield table
            for options in others:
                yield solver.make(process, times, afs=afs, **options)
            break


def _same(left: SolverTable, right: SolverTable) -> bool:
    pairs = ((left.a, right.a), (left.b, right.b), (left.times, right.times))
    return left.prediction == right.prediction and all(
        one.shape == other.shape and bool((one - other).abs().max() < 1e-13) for one, other in pairs
    )


def handcrafted_table(
    process: Process,
    method: str,
    nfe: int,
    *,
    grid: str | None = None,
    order: int | None = None,
    afs: str = "off",
    **options: Any,
) -> SolverTable:
    """The named solver with exactly ``nfe`` evaluations, on as many steps as that takes.

    Args:
        grid: name of the times; None for the process's own (``grids.default_grid``).

    Raises:
        ValueError: unknown name or option, or no number of steps gives that nfe.
    """
    if afs not in ("off", "dockhorn", "zero"):
        raise ValueError(f"afs is {afs!r}, expected off, dockhorn or zero")
    if order is not None:
        options["order"] = order
    options["afs"] = False if afs == "off" else afs
    grid = grid or default_grid(process)
    possible: set[int] = set()
    # Infinite ends and AFS each save at most one evaluation; a step fewer is there for the error.
    each = SOLVERS[method].evaluations_per_step if method in SOLVERS else 1
    base = math.ceil(nfe / each)
    for steps in range(max(base - 1, 2 if afs != "off" else 1), base + 3):
        table = make_solver(method, process, named_grid(process, grid, steps), **options)
        if table.nfe == nfe:
            return table
        possible.add(table.nfe)
    near = sorted(possible, key=lambda cost: abs(cost - nfe))[:2]
    raise ValueError(f"{method} cannot make exactly {nfe} evaluations; near it: {sorted(near)}")


# -- labels: solver[order][-option]/grid[/afs-kind] ------------------------------------------------

_WORDS: dict[str, tuple[str, Any]] = {
    "flat": ("lower_order_final", False),
    "exact": ("exact", True),
    "bh1": ("variant", "bh1"),
    "rhoab": ("variant", "rhoab"),
}
"""Word in a label -> the option it stands for; other options are ``name=value``."""


class Label(NamedTuple):
    """What a label says, as ``handcrafted_table`` takes it."""

    method: str
    options: dict[str, Any]
    grid: str | None
    afs: str


def label_of(table: SolverTable, grid: str) -> str:
    """``dpm_solver_pp3-flat/logsnr/afs-dockhorn``: name, order, options, grid, first step.

    Options that are the maker's defaults are not named; ``parse_label`` reads it back.
    """
    options = {k: v for k, v in table.options.items() if k not in ("order", "afs")}
    defaults = SOLVERS[table.name].defaults if table.name in SOLVERS else options
    words = [
        next((word for word, held in _WORDS.items() if held == (key, value)), f"{key}={value}")
        for key, value in options.items()
        if value != defaults.get(key, value)
    ]
    head = f"{table.name}{table.options.get('order', '')}"
    afs = table.options.get("afs")
    return "/".join(["-".join([head, *words]), grid, *([f"afs-{afs}"] if afs else [])])


def parse_label(text: str) -> Label:
    """The parts of a label; the grid is None where it is left out.

    Raises:
        ValueError: not ``solver[order][-option]/grid[/afs-kind]``, or a name that is unknown.
    """
    (head, *words), *rest = text.split("/")[0].split("-"), *text.split("/")[1:]
    names = [n for n in SOLVERS if head == n or (head[: len(n)] == n and head[len(n) :].isdigit())]
    if not names or len(rest) > 2:
        raise ValueError(
            f"method is {text!r}, expected solver[order][-option]/grid[/afs-kind] with a solver "
            f"of {sorted(SOLVERS)}"
        )
    method = max(names, key=len)
    options: dict[str, Any] = {"order": int(head[len(method) :])} if head != method else {}
    for word in words:
        name, _, value = word.partition("=")
        known = {w: o for w, o in _WORDS.items() if o[0] in SOLVERS[method].options}
        if not value and word not in known:
            raise ValueError(f"method {text!r}: {word!r} is no option, expected {sorted(known)}")
        options |= dict([known[word]]) if not value else {name: _plain(value)}
    afs = [part for part in rest if part.startswith("afs-")]
    grid = next((part for part in rest if part not in afs), None)
    if len(afs) > 1:
        raise ValueError(
            f"method {text!r} has {len(afs)} analytical first steps, expected at most 1"
        )
    if len(rest) - len(afs) > 1 or (grid is not None and grid not in GRIDS):
        raise ValueError(f"method {text!r}: grid is {grid!r}, expected one of {', '.join(GRIDS)}")
    return Label(method, options, grid, afs[0].removeprefix("afs-") if afs else "off")


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value

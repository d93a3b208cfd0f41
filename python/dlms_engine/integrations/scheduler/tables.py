"""Solver names -> tables, with the defaults diffusers gives the schedulers of that name."""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ...processes import Process
from ...solvers import SOLVERS, make_solver
from ...solvers.common import Node, Run, check_order
from ...solvers.ipndm import multistep
from ...solvers.quadrature import lagrange_weights
from ...solvers.table import SolverTable

DEFAULT_ORDER = {"dpm_solver_pp": 2, "unipc": 2, "deis": 2}
"""diffusers' default ``solver_order``; the other solvers keep the engine's own default."""
FEW_STEPS = 15
"""DPM-Solver++ and DEIS lower the final order only below this many steps, as in diffusers."""
_CACHE_SIZE = 64
_cache: OrderedDict[tuple[Any, ...], SolverTable] = OrderedDict()


def named_table(
    name: str, process: Process, grid: Tensor, options: dict[str, Any], key: object = None
) -> SolverTable:
    """The table of solver ``name`` with diffusers' defaults; the last few are remembered.

    Args:
        options: of the maker, plus ``order`` and ``lower_order_final`` where they apply.
        key: identifies ``process`` (``NoiseModel.key``); None does not remember.

    Raises:
        ValueError: unknown name or option.
    """
    where = (name, json.dumps(options, sort_keys=True), tuple(grid.tolist()), key)
    # Taken out and put back, as threads that share the cache may push it out in between.
    table = None if key is None else _cache.pop(where, None)
    if table is None:
        table = _make(name, process, grid, dict(options))
    if key is not None:
        _cache[where] = table
        while len(_cache) > _CACHE_SIZE:
            with contextlib.suppress(KeyError):
                _cache.popitem(last=False)
    return table


def _make(name: str, process: Process, grid: Tensor, options: dict[str, Any]) -> SolverTable:
    if name == "deis" and "variant" not in options:
        return deis_log(process, grid, **options)
    if name == "deis":
        options.pop("lower_order_final", None)
    return make_solver(name, process, grid, **options)


def solver_options(
    name: str,
    order: int | None,
    lower_order_final: bool,
    extra: dict[str, Any] | None,
    steps: int,
) -> dict[str, Any]:
    """The options of ``name`` out of the scheduler's settings; ``extra`` has the last word.

    ``steps`` is the whole run's, also for the table of a late start.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver is {name!r}, expected one of {sorted(SOLVERS)} or a solver file")
    known = SOLVERS[name].options
    options: dict[str, Any] = {}
    order = DEFAULT_ORDER.get(name) if order is None else order
    if order is not None and "order" in known:
        options["order"] = order
    if "lower_order_final" in known or name == "deis":
        few = name == "unipc" or steps < FEW_STEPS
        options["lower_order_final"] = lower_order_final and few
    return {**options, **(extra or {})}


def deis_log(
    process: Process, grid: Tensor, *, order: int = 2, lower_order_final: bool = True
) -> SolverTable:
    """DEIS with noise interpolated in log(sigma / alpha) ("logrho" in diffusers).

    Zhang & Chen 2023, eq. 14 with that clock; the integrals are exact to rounding. With
    ``lower_order_final`` the last steps have orders ..., 2, 1. A last step to sigma = 0 is first
    order: log(sigma / alpha) is infinite there.
    """
    order = check_order(order, 4)
    run = Run(process, grid, default_store="noise")
    index = {id(node): i for i, node in enumerate(run.nodes)}

    def weights(history: list[Node], end: Node) -> list[Tensor]:
        left = run.steps - index[id(end)] + 1
        use = min(len(history), left) if lower_order_final else len(history)
        use = 1 if end.last else use
        ratios = [node.ratio for node in history if node.ratio is not None]
        assert end.ratio is not None
        if use == 1:
            found = [end.ratio - ratios[0]]
        else:
            found = lagrange_weights(ratios[:use], end.ratio, torch.log)
        return found + [torch.zeros_like(found[0])] * (len(history) - use)

    return run.table(multistep(run, order, weights), "deis", order=order, variant="logrho")

"""What every maker needs: the grid's coefficients and the walk over it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..processes import Process
from ..processes.grids import check_grid, integer
from .table import Prediction, SolverTable
from .trace import AnalyticOutput, Form, Trace, TracedOutput

Afs = bool | Literal["dockhorn", "zero"]
Evaluation = TracedOutput | AnalyticOutput


def afs_kind(afs: Afs) -> str | None:
    """None, ``"dockhorn"`` (also for True) or ``"zero"``; ValueError for anything else."""
    if afs is False:
        return None
    if afs is True or afs == "dockhorn":
        return "dockhorn"
    if afs == "zero":
        return "zero"
    raise ValueError(f"afs is {afs!r}, expected False, True, 'dockhorn' or 'zero'")


def check_order(order: int, highest: int) -> int:
    """``order`` if it is an integer in 1..highest."""
    return integer("order", order, 1, highest)


class Node:
    """Coefficients at one time; ``lambda_`` and ``ratio`` (sigma / alpha) are None where infinite.

    ``first`` (alpha = 0: pure noise, lambda_ = -inf) and ``last`` (sigma = 0, lambda_ = +inf) tell
    the two infinite ends apart.
    """

    def __init__(self, t: Tensor, alpha: Tensor, sigma: Tensor, lambda_: Tensor | None) -> None:
        self.t, self.alpha, self.sigma, self.lambda_ = t, alpha, sigma, lambda_
        self.first = lambda_ is None and bool((alpha.detach() == 0).all())
        self.last = lambda_ is None and not self.first
        self.ratio = None if self.first else sigma / alpha


def make_nodes(process: Process, times: Tensor) -> list[Node]:
    """One node per entry of the last dimension of ``times``.

    Raises:
        ValueError: alpha or sigma is 0 in the middle, or in a part of the batch only.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    infinite = ((alpha == 0) | (sigma == 0)).detach().flatten(0, -2) if times.ndim > 1 else None
    flat = ((alpha == 0) | (sigma == 0)).detach()[None] if infinite is None else infinite
    anywhere, count = flat.any(dim=0).tolist(), times.shape[-1]
    if anywhere != flat.all(dim=0).tolist() or any(anywhere[1:-1]):
        raise ValueError(
            f"alpha or sigma is 0 between the ends or for a part of the batch: {times.tolist()}; "
            "alpha = 0 is possible at the first time only, sigma = 0 at the last"
        )
    low, high = int(anywhere[0]), count - int(anywhere[-1] and count > 1)
    finite = process.lambda_(times[..., low:high]).unbind(-1)
    lambdas = [None] * low + list(finite) + [None] * (count - high)
    columns = (value.unbind(-1) for value in (times, alpha, sigma))
    return [Node(*values) for values in zip(*columns, lambdas, strict=True)]


class Run:
    """One walk of a solver over a grid ``[*batch, steps + 1]`` on traced values.

    Args:
        store: what the history holds; None takes ``default_store``, or ``"data"`` where noise
            cannot be stored (an evaluation at alpha = 0, of the grid or of the network's times).
        network_times: decoupled times ``[*batch, steps + 1]`` the network is called at; the last is
            not used. Coefficients stay those of ``grid``.
    """

    def __init__(
        self,
        process: Process,
        grid: Tensor,
        *,
        afs: Afs = False,
        network_times: Tensor | None = None,
        store: Prediction | None = None,
        default_store: Prediction = "data",
    ) -> None:
        self.process = process
        self.afs = afs_kind(afs)
        grid = check_grid(process, grid)
        called_at = grid if network_times is None else network_times.to(torch.float64)
        if called_at.shape[-1:] != grid.shape[-1:]:
            raise ValueError(
                f"network_times have shape {tuple(called_at.shape)}, expected that of the grid, "
                f"{tuple(grid.shape)}"
            )
        batch = (grid[..., 0] + called_at[..., 0]).shape
        self.grid = grid
        self.nodes = make_nodes(process, grid.expand(*batch, -1))
        self.called_at = called_at.expand(*batch, -1).unbind(-1)
        self.steps = len(self.nodes) - 1
        if store is None:
            # Wherever the network is called, at alpha = 0 of the grid noise says nothing about data.
            first = (grid[..., 0], self.called_at[0])
            blind = self.afs is None and any(map(self._blind, first))
            store = "data" if blind else default_store
        self.trace = Trace(process, store, tuple(batch))

    def _blind(self, t: Tensor) -> bool:
        return bool((self.process.alpha(t.detach()) == 0).any())

    def start(self) -> Form:
        """The state at ``grid[0]``."""
        return self.trace.start()

    def evaluate(self, x: Form, i: int) -> Evaluation:
        """The evaluation that opens step ``i``: analytical for i = 0 with AFS."""
        if i == 0 and self.afs is not None:
            return self.trace.analytic(x, self.nodes[0].t, self.afs)
        return self.trace.evaluate(x, self.nodes[i].t, self.called_at[i])

    def evaluate_at(self, x: Form, node: Node) -> TracedOutput:
        """An evaluation between grid times."""
        return self.trace.evaluate(x, node.t)

    def node(self, t: Tensor) -> Node:
        """The node at a time ``[*batch]`` between grid times."""
        return make_nodes(self.process, t[..., None])[0]

    def usable(self, i: int) -> int:
        """How many of the newest evaluations up to ``i`` lie at finite lambda_ (at least 1)."""
        return i if self.nodes[0].first and i > 0 else i + 1

    def table(self, final: Form, name: str, **options: Any) -> SolverTable:
        """The finished table; ``afs`` and the settings given go into its options."""
        return self.trace.table(
            final, self.grid, name=name, options={**options, "afs": self.afs or False}
        )


def noise_step(start: Node, end: Node, x: Form, noise: Form) -> Form:
    """X / alpha moves by ``noise`` times the change of sigma / alpha (Euler in sigma / alpha)."""
    if start.ratio is None or end.ratio is None:
        raise ValueError(
            f"alpha is 0 at t = {start.t.tolist()}: a noise prediction carries nothing there, use "
            "prediction='data'"
        )
    return x * (end.alpha / start.alpha) + noise * (end.alpha * (end.ratio - start.ratio))

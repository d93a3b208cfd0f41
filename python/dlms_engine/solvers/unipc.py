"""UniPC (Zhao et al. 2023): predictor UniP-p and corrector UniC-p in one evaluation a step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..processes import Process
from .common import Afs, Node, Run, check_order
from .dpm_solver import step_order
from .exponential import ExponentialStep, lambdas, phi, predicted
from .table import Prediction, SolverTable
from .trace import Form


def unipc(
    process: Process,
    grid: Tensor,
    *,
    order: int = 3,
    variant: Literal["bh1", "bh2"] = "bh2",
    prediction: Prediction = "data",
    lower_order_final: bool = True,
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """UniPC-p (Algorithms 5-8): the state after a step is corrected with the evaluation that opens
    the next one, so the corrector is part of the next row and the number of evaluations is exactly
    the number of steps. The last step has no corrector, whatever the order.

    Args:
        grid: float64 ``[*batch, steps + 1]``, decreasing; may require grad (the full graph is
            kept, through the linear systems too).
        order: 1..3.
        variant: B(h) = h (``"bh1"``) or e^h - 1 (``"bh2"``), in the prediction's sign.
        prediction, lower_order_final, afs, network_times, store: as for ``dpm_solver_pp``. Steps
            at infinite lambda_ are first order and not corrected.
    """
    order = check_order(order, 3)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant is {variant!r}, expected 'bh1' or 'bh2'")
    run = Run(
        process, grid, afs=afs, network_times=network_times, store=store, default_store=prediction
    )
    x, history = run.start(), list[Form]()
    previous: _Step | None = None
    for i in range(run.steps):
        out = run.evaluate(x, i)
        newest = predicted(out, prediction)
        corrected = out.x
        if previous is not None:
            corrected = corrected + previous.correction(newest)
        history = [newest, *history][:order]
        now = step_order(run, i, order, lower_order_final)
        nodes = [run.nodes[i - k] for k in range(now)]
        previous = _Step(run.nodes[i + 1], nodes, history[:now], prediction, variant)
        x = corrected * previous.base + previous.increment
    return run.table(
        x,
        "unipc",
        order=order,
        variant=variant,
        prediction=prediction,
        lower_order_final=lower_order_final,
    )


class _Step:
    """One step of order p = len(nodes): predicted state ``base x + increment`` and its corrector.

    With D_k = (m_k - m_0) / r_k, R[a][k] = r_k^(a-1) and b_a = a! u phi_{a+1}(u) / B, the predictor
    adds -c B sum_k rho_k D_k with the leading (p-1)-block of R rho = b (1/2 at p = 2), the
    corrector the same with the whole system and D_p = m_new - m_0 (section 3.1).
    """

    def __init__(
        self, end: Node, nodes: list[Node], m: list[Form], prediction: Prediction, variant: str
    ) -> None:
        step = ExponentialStep(nodes[0], end, prediction)
        self.base, self.u, self.m = step.base, step.u, m
        self.increment = m[0] * step.first
        if self.u is None:
            return
        self.order = len(nodes)
        h, lam = self.u.abs(), lambdas(nodes)
        self.r = [(value - lam[0]) / h for value in lam[1:]] + [torch.ones_like(h)]
        b_of_h = self.u if variant == "bh1" else torch.expm1(self.u)
        self.scale = -step.scale * b_of_h
        powers = [torch.stack([r**a for r in self.r], dim=-1) for a in range(self.order)]
        self._matrix = torch.stack(powers, dim=-2)
        self._right = torch.stack(
            [
                math.factorial(a) * self.u * phi(a + 1, self.u) / b_of_h
                for a in range(1, self.order + 1)
            ],
            dim=-1,
        )
        self._rho = self._predictor_weights()
        for weight, difference in zip(self._rho, self._differences(), strict=True):
            self.increment = self.increment + difference * (self.scale * weight)

    def _differences(self) -> list[Form]:
        return [(m - self.m[0]) / r for m, r in zip(self.m[1:], self.r, strict=False)]

    def _solve(self, size: int) -> list[Tensor]:
        right = self._right[..., :size]
        weights = torch.linalg.solve(self._matrix[..., :size, :size], right[..., None])
        return list(weights[..., 0].unbind(-1))

    def _predictor_weights(self) -> list[Tensor]:
        assert self.u is not None
        if self.order == 2:
            return [torch.full_like(self.u, 0.5)]
        return self._solve(self.order - 1) if self.order > 2 else []

    def correction(self, newest: Form) -> Form:
        """Corrected minus predicted state, given the prediction at the predicted state.

        Written as a difference, so that what both share is absent from the row.
        """
        if self.u is None:
            return Form({}, {})
        rho = [torch.full_like(self.u, 0.5)] if self.order == 1 else self._solve(self.order)
        change = (newest - self.m[0]) * rho[-1]
        for weight, old, difference in zip(rho, self._rho, self._differences(), strict=False):
            change = change + difference * (weight - old)
        return change * self.scale

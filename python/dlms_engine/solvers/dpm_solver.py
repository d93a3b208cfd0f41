"""DPM-Solver++ (Lu et al. 2022b) and DPM-Solver-2 (Lu et al. 2022a)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..processes import Process, RectifiedFlow
from .common import Afs, Node, Run, check_order, noise_step
from .exponential import ExponentialStep, lambdas, phi, predicted
from .table import Prediction, SolverTable
from .trace import Form


def dpm_solver_pp(
    process: Process,
    grid: Tensor,
    *,
    order: int = 2,
    prediction: Prediction = "data",
    lower_order_final: bool = True,
    exact: bool = False,
    afs: Afs = False,
    network_times: Tensor | None = None,
    store: Prediction | None = None,
) -> SolverTable:
    """Multistep DPM-Solver++ 1S / 2M / 3M (Lu et al. 2022b, Algorithm 2 and its third order).

    Args:
        grid: float64 ``[*batch, steps + 1]``, decreasing; may require grad.
        order: 1..3.
        prediction: which prediction is interpolated in lambda_; ``"noise"`` is the multistep
            form of DPM-Solver and cannot start at alpha = 0.
        lower_order_final: the last steps use orders ..., 2, 1 for every number of steps. A last
            step to sigma = 0 is first order in any case (lambda_ is infinite there).
        exact: integrate the interpolant exactly. The published rules do not: 2M replaces a phi
            function by 1/2, which keeps its order, and 3M has half the second derivative's term,
            so that its order is 2. False gives the published numbers.
        afs: analytical first step (False, True, "dockhorn", "zero"): one evaluation less.
        network_times: decoupled times, shaped like ``grid``.
        store: what the table's history holds; None for ``prediction``.
    """
    order = check_order(order, 3)
    run = Run(
        process, grid, afs=afs, network_times=network_times, store=store, default_store=prediction
    )
    x, history = run.start(), list[Form]()
    for i in range(run.steps):
        step = ExponentialStep(run.nodes[i], run.nodes[i + 1], prediction)
        out = run.evaluate(x, i)
        history = [predicted(out, prediction), *history][:order]
        now = step_order(run, i, order, lower_order_final)
        nodes = [run.nodes[i - k] for k in range(now)]
        x = out.x * step.base + _increment(step, history[:now], nodes, exact)
    return run.table(
        x,
        "dpm_solver_pp",
        order=order,
        prediction=prediction,
        lower_order_final=lower_order_final,
        exact=exact,
    )


def step_order(run: Run, i: int, order: int, lower_order_final: bool) -> int:
    """Order of step ``i``: bounded by the history, the end and infinite lambda_."""
    if run.nodes[i].first or run.nodes[i + 1].last:
        return 1
    now = min(order, run.usable(i))
    return min(now, run.steps - i) if lower_order_final else now


def _increment(step: ExponentialStep, m: list[Form], nodes: list[Node], exact: bool) -> Form:
    """All but ``base * x``; ``m`` and ``nodes`` newest first, as many as the order."""
    if len(m) == 1:
        return m[0] * step.first
    assert step.u is not None
    # (e^u - 1)/u - 1 = u phi_2(u), and so on
    second, third = (step.scale * step.u * phi(k, step.u) for k in (2, 3))
    return multistep_sum(m, lambdas(nodes), step.u.abs(), (step.first, second, third), exact)


def multistep_sum(
    m: list[Form],
    lam: list[Tensor],
    h: Tensor,
    integrals: tuple[Tensor, Tensor, Tensor],
    exact: bool = False,
) -> Form:
    """What the predictions ``m``, two or three of them, add in a step of order ``len(m)``.

    Args:
        m, lam: predictions and their lambda_, newest first.
        h: length of the step in lambda_.
        integrals: of 1, and minus those of the first and second power, times the step's factor.
        exact: as for ``dpm_solver_pp``.
    """
    first, second, third = integrals
    r0 = (lam[0] - lam[1]) / h
    d0 = (m[0] - m[1]) / r0
    if len(m) == 2:
        return m[0] * first - d0 * second if exact else (m[0] + d0 * 0.5) * first
    r1 = (lam[1] - lam[2]) / h
    d1 = (m[1] - m[2]) / r1
    slope = d0 + (d0 - d1) * (r0 / (r0 + r1))
    curvature = (d0 - d1) / (r0 + r1)
    return m[0] * first - slope * second - curvature * (2 * third if exact else third)


def dpm_solver_pp_2s(
    process: Process,
    grid: Tensor,
    *,
    r: float = 0.5,
    prediction: Prediction = "data",
    afs: Afs = False,
    store: Prediction | None = None,
) -> SolverTable:
    """Singlestep DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1): two evaluations a step.

    ``r`` in (0, 1) places the intermediate time in lambda_. Steps at infinite lambda_ are first
    order and cost one evaluation.
    """
    if not 0 < r < 1:
        raise ValueError(f"r is {r}, expected a number in (0, 1)")
    run = Run(process, grid, afs=afs, store=store, default_store=prediction)
    x = run.start()
    for i in range(run.steps):
        start, end = run.nodes[i], run.nodes[i + 1]
        step = ExponentialStep(start, end, prediction)
        out = run.evaluate(x, i)
        m = predicted(out, prediction)
        if start.lambda_ is None or end.lambda_ is None:
            x = out.x * step.base + m * step.first
            continue
        between = start.lambda_ + r * (end.lambda_ - start.lambda_)
        middle = run.node(process.inverse_lambda(between))
        half = ExponentialStep(start, middle, prediction)
        inner = run.evaluate_at(out.x * half.base + m * half.first, middle)
        mixed = m * (1 - 1 / (2 * r)) + predicted(inner, prediction) * (1 / (2 * r))
        x = out.x * step.base + mixed * step.first
    return run.table(x, "dpm_solver_pp_2s", r=r, prediction=prediction)


def dpm_solver_2(
    process: Process,
    grid: Tensor,
    *,
    r: float = 0.5,
    afs: Afs = False,
    store: Prediction | None = None,
) -> SolverTable:
    """Second-order Runge-Kutta with a middle evaluation at sigma_t^r sigma_s^(1-r) (sigma / alpha).

    r = 0.5 is the geometric mean of Karras et al. 2022 (Appendix, Algorithm 3) and DPM-Solver-2.
    Two evaluations a step; a last step to sigma = 0 is first order and costs one. A flow is
    integrated in t instead, dx/dt = noise - data, with the middle at t_s + r (t_t - t_s): finite at
    both ends, always two evaluations.
    """
    if not 0 < r <= 1:
        raise ValueError(f"r is {r}, expected a number in (0, 1]")
    run = Run(process, grid, afs=afs, store=store)
    return run.table(two_stage(run, r), "dpm_solver_2", r=r)


def heun(
    process: Process, grid: Tensor, *, afs: Afs = False, store: Prediction | None = None
) -> SolverTable:
    """Heun's method (Karras et al. 2022, Algorithm 1), ``dpm_solver_2`` with r = 1.

    Two evaluations a step, the last included unless it goes to sigma = 0 (first order, one
    evaluation). In sigma / alpha, or in t for a flow.
    """
    return (run := Run(process, grid, afs=afs, store=store)).table(two_stage(run, 1.0), "heun")


def two_stage(run: Run, r: float) -> Form:
    """All steps: x' = x + h [d_middle / (2r) + (1 - 1/(2r)) d] in the process's clock."""
    flow = isinstance(run.process, RectifiedFlow)
    x = run.start()
    for i in range(run.steps):
        start, end = run.nodes[i], run.nodes[i + 1]
        out = run.evaluate(x, i)
        slope = out.noise - out.data if flow else out.noise
        middle = _middle(run, start, end, r)
        if middle is None or middle.last:
            x = _advance(flow, start, end, out.x, slope)
            continue
        inner = run.evaluate_at(_advance(flow, start, middle, out.x, slope), middle)
        inner_slope = inner.noise - inner.data if flow else inner.noise
        mixed = inner_slope * (1 / (2 * r))
        if r != 0.5:
            mixed = mixed + slope * (1 - 1 / (2 * r))
        x = _advance(flow, start, end, out.x, mixed)
    return x


def _middle(run: Run, start: Node, end: Node, r: float) -> Node | None:
    if r == 1.0:
        return end
    if isinstance(run.process, RectifiedFlow):
        return run.node(start.t + r * (end.t - start.t))
    if start.ratio is None or end.ratio is None or end.last:
        return None
    ratio = torch.exp(r * torch.log(end.ratio) + (1 - r) * torch.log(start.ratio))
    return run.node(run.process.inverse_sigma(ratio))


def _advance(flow: bool, start: Node, end: Node, x: Form, slope: Form) -> Form:
    if flow:
        return x + slope * (end.t - start.t)
    return noise_step(start, end, x, slope)

"""D-ODE solvers as programs over traced values: every row's base step and its directions.

d is the prediction of an evaluation, d_prev the one before it in sampling order; a row of a base
solver that weighs d by c becomes base + c * lambda * (d - d_prev) (supplement, eq. 4-33).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...processes import Process
from ...solvers.common import make_nodes, noise_step
from ...solvers.exponential import ExponentialStep, lambdas, phi, predicted
from ...solvers.table import SolverTable
from ...solvers.trace import Form
from .fit import FormulaRecorder
from .settings import DodeSettings


def surrogate(process: Process, t: Tensor, x: Form) -> Form:
    """What stands for d_prev at the first noise prediction: the start state at unit variance."""
    return x / torch.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2)


def multistep_program(
    recorder: FormulaRecorder, base: SolverTable, settings: DodeSettings, with_first: bool
) -> Form:
    """D-DDIM, D-iPNDM, D-DEIS, D-DPM-Solver++: x' = a x + c dbar, dbar a mean of predictions.

    dbar is the base row's combination with weights summing to one. D-DEIS corrects this effective
    noise, as the public code does (the supplement's eq. 21 would correct c * dbar).
    """
    x, outputs, means = recorder.start(), list[Form](), list[Form]()
    for n in range(base.nfe):
        out = recorder.evaluate(x, base.times[n])
        outputs = [predicted(out, base.prediction), *outputs]
        c = base.b[n].sum()
        mean = Form({}, {})
        for k in range(min(base.depth, n + 1)):
            if float(base.b[n, k]) != 0:
                mean = mean + outputs[k] * (base.b[n, k] / c)
        first = surrogate(base.process, base.times[n], out.x) if with_first and n == 0 else None
        directions = _directions(settings.formulation, mean, means, first)
        means = [mean, *means]
        x = recorder.correct(out.x * base.a[n] + mean * c, c, mean, directions)
    return x


def _directions(
    formulation: str, mean: Form, earlier: list[Form], first: Form | None
) -> list[Form]:
    """Table 1 of the supplement; "sep" and "all" are written as changes of the plain weights."""
    if formulation == "sep":
        return [mean, *earlier[:1]]
    if formulation == "all":
        return [mean, *earlier]
    before = earlier[: 2 if formulation == "two" else 1] or ([first] if first is not None else [])
    return [mean - other for other in before]


def singlestep(
    recorder: FormulaRecorder,
    process: Process,
    grid: Tensor,
    settings: DodeSettings,
    with_first: bool,
) -> Form:
    """D-DPM-Solver-2 and -3 (Lu et al. 2022a, Algorithms 4 and 5), or their data form.

    Stages sit at the grid's own times, so that evaluation n is at ``grid[n]``.
    """
    prediction = settings.resolved_prediction(process)
    nodes = make_nodes(process, grid)
    if any(node.lambda_ is None for node in nodes):
        raise ValueError(
            f"dpm_solver needs finite lambda_ on the whole grid, got times {grid.tolist()}"
        )
    x, before, i = recorder.start(), None, 0
    for order in settings.orders():
        whole = ExponentialStep(nodes[i], nodes[i + order], prediction)
        out = recorder.evaluate(x, nodes[i].t)
        d, start = predicted(out, prediction), out.x
        if before is None and with_first:
            before = surrogate(process, nodes[i].t, start)
        directions = [] if before is None else [d - before]
        step = ExponentialStep(nodes[i], nodes[i + 1], prediction)
        x = recorder.correct(start * step.base + d * step.first, step.first, d, directions)
        before = d
        lam = lambdas(nodes[i : i + order + 1])
        if order > 1:
            r1 = (lam[1] - lam[0]) / (lam[-1] - lam[0])
            d1 = predicted(recorder.evaluate(x, nodes[i + 1].t), prediction)
            before = d1
        if order == 2:
            c = whole.first * (0.5 / r1)
            plain = start * whole.base + d * whole.first
            x = recorder.correct(plain + (d1 - d) * c, c, d1, [d1 - d])
        if order == 3:
            r2 = (lam[2] - lam[0]) / (lam[-1] - lam[0])
            step = ExponentialStep(nodes[i], nodes[i + 2], prediction)
            c = _second(step) * (r2 / r1)
            plain = start * step.base + d * step.first
            x = recorder.correct(plain + (d1 - d) * c, c, d1, [d1 - d])
            d2 = predicted(recorder.evaluate(x, nodes[i + 2].t), prediction)
            c = _second(whole) / r2
            plain = start * whole.base + d * whole.first
            x = recorder.correct(plain + (d2 - d) * c, c, d2, [d2 - d1])
            before = d2
        i += order
    return x


def _second(step: ExponentialStep) -> Tensor:
    """-scale ((e^u - 1)/u - 1), what weighs the slope of a third-order step."""
    assert step.u is not None
    return -step.scale * step.u * phi(2, step.u)


def heun_program(recorder: FormulaRecorder, process: Process, grid: Tensor, nfe: int) -> Form:
    """D-EDM: Heun in sigma / alpha on data predictions, a lambda for each stage.

    As in the public code: the first slope of the average is the plain one, the second is taken at
    the corrected inner state. An odd ``nfe`` ends with an Euler step.
    """
    nodes = make_nodes(process, grid)
    x, before = recorder.start(), list[Form]()
    for i in range(len(nodes) - 1):
        start, end = nodes[i], nodes[i + 1]
        out = recorder.evaluate(x, start.t)
        step = ExponentialStep(start, end, "data")
        directions = [out.data - other for other in before]
        x = recorder.correct(
            out.x * step.base + out.data * step.first, step.first, out.data, directions
        )
        before = [out.data]
        if i == len(nodes) - 2 and nfe % 2:
            break
        if end.last or start.ratio is None or end.ratio is None:
            raise ValueError(
                f"edm with nfe={nfe} takes a Heun step to t = {float(end.t)}, where the noise or "
                "the data has weight 0: use an odd nfe, or a grid inside the range"
            )
        inner = recorder.evaluate(x, end.t)
        c = end.alpha * (start.ratio - end.ratio) / (2 * end.ratio)
        mean = (out.noise + inner.noise) * 0.5
        x = noise_step(start, end, out.x, mean)
        x = recorder.correct(x, c, inner.data, [inner.data - out.data])
        before = [inner.data]
    return x

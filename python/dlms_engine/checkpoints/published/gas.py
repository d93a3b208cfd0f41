"""Generalized Solvers (GS, GAS; ICLR 2026): DPM-Solver++(3M) with corrections at learned times.

n_j     = network's noise at t_j + xi_j
m_j     = (x_j - sigma(t_j) n_j) / alpha(t_j)
x_{n+1} = DPM-Solver++'s step on m, its coefficients plus learned ones,
          + sum of learned weights of all earlier states and outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...policies.distilled import DistilledSolver
from ...processes import EDM, VP, Process, RectifiedFlow
from ...solvers.table import SolverTable
from ...solvers.trace import Form
from .contents import no_more, numbers, take
from .levels import LevelTrace

LOGIT_EDGE = 1e-5
"""The published sigmoid stays this far from 0 and 1."""
_MOST_STEPS = 64


def is_gas(held: Any) -> bool:
    """A checkpoint of the training: moving averages, parameters, optimizer, step."""
    if not isinstance(held, dict) or not isinstance(held.get("ema"), dict):
        return False
    return {"ema", "model", "step"} <= set(held) and "shadow_params" in held["ema"]


def from_gas(held: Any, process: Process | None, options: dict[str, Any]) -> DistilledSolver:
    """The table of the averaged parameters.

    Args:
        process: of the network. On EDM's (the default) the solver's time is that of the VP line with
            beta 0.1 to 20, as published for EDM networks; otherwise it is the process's own.
        options: ``t_eps``, the last time, which the file does not hold (published: 1e-3, and 1e-4 for
            FFHQ and AFHQv2).

    Raises:
        ValueError: parameters of another number or shape, a flow, or no ``t_eps``.
    """
    t_eps = take(options, "t_eps")
    no_more(options)
    if not isinstance(t_eps, float) or not 0 < t_eps < 1:
        raise ValueError(
            f"t_eps is {t_eps!r}; the last time is not in the file: --set t_eps=0.001 is that of "
            "CIFAR-10 and the latent models, 0.0001 of FFHQ and AFHQv2"
        )
    process = EDM(0.002, 80.0) if process is None else process
    if isinstance(process, RectifiedFlow):
        raise ValueError("its steps are of a variance-preserving process, and the model is a flow")
    clock = VP(19.9, 0.1, t_min=t_eps) if isinstance(process, EDM) else process
    logits, shifts, state, output = _parameters(held["ema"]["shadow_params"])
    grid = stick_times(logits, t_eps)
    table = generalized_table(process, clock, grid, shifts, state, output)
    return DistilledSolver(table, "gs", {"method": "gs", "t_eps": t_eps})


def _parameters(held: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[N - 1]``, shifts ``[N]``, corrections of states and outputs ``[order, N]``."""
    if not isinstance(held, Sequence) or not 4 <= len(held) <= 2 + 2 * _MOST_STEPS:
        raise ValueError("its shadow_params are no list of parameters")
    steps = len(held[1]) if isinstance(held[1], Tensor) and held[1].ndim == 1 else 0
    if len(held) % 2 or not 2 <= steps <= _MOST_STEPS or (len(held) - 2) // 2 > steps:
        raise ValueError(
            f"its shadow_params are {len(held)} tensors for {steps} steps, expected times, offsets and "
            "two corrections an order"
        )
    logits = numbers("mu_logit", held[0], (steps - 1,))
    shifts = numbers("t_couple", held[1], (steps,))
    rest = [numbers("corrections", value, (steps,)) for value in held[2:]]
    return logits, shifts, torch.stack(rest[1::2]), torch.stack(rest[0::2])


def stick_times(logits: Tensor, t_eps: float) -> Tensor:
    """Times ``[N + 1]`` from 1 to ``t_eps``: each logit breaks a share off what is left (eq. 14)."""
    share = torch.sigmoid(logits) * (1 - 2 * LOGIT_EDGE) + LOGIT_EDGE
    inner = 1 - torch.cumprod(share, 0)
    ends = [inner.new_tensor([value]) for value in (t_eps, 1.0)]
    return torch.cat([ends[0], inner * (1 - t_eps) + t_eps, ends[1]]).flip(0)


def generalized_table(
    process: Process, clock: Process, grid: Tensor, shifts: Tensor, state: Tensor, output: Tensor
) -> SolverTable:
    """The solver above as a table of ``process``.

    Args:
        clock: the variance-preserving process the steps are written in.
        grid: float64 ``[N + 1]`` in the clock's time.
        shifts: ``[N]``, xi. state, output: ``[order, N]`` corrections, row k - 1 of the k-th newest.
    """
    order = len(state)
    trace = LevelTrace(process)
    times = grid if clock is process else process.inverse_sigma(clock.sigma_over_alpha(grid))
    # the published start is unit noise in the clock's scale, not sigma times it
    x = trace.start(times[0]) / trace.level(times[0])
    states, outputs = list[Form](), list[Form]()
    for n, t in enumerate(grid[:-1]):
        called = t + shifts[n]
        level, alpha = clock.sigma_over_alpha(called), clock.alpha(called)
        scaled, noise = trace.direction(x / alpha, level, level)
        x = scaled * alpha
        m = (x - noise * clock.sigma(t)) / clock.alpha(t)
        states, outputs = [x, *states][:order], [m, *outputs][:order]
        reach = grid[max(0, n + 1 - order) : n + 2].flip(0)
        x = _step(clock, reach, states, outputs, state[:, n], output[:, n])
    return trace.table(x / clock.alpha(grid[-1]), times, "gs", order=order)


def _step(
    clock: Process, times: Tensor, states: list[Form], outputs: list[Form], a: Tensor, c: Tensor
) -> Form:
    """One step; ``times`` are the end's and the history's, newest first, as are the histories."""
    lam = clock.lambda_(times)
    h, alpha = lam[0] - lam[1], clock.alpha(times[0])
    decay = torch.expm1(-h)
    x = states[0] * (clock.sigma(times[0]) / clock.sigma(times[1]) + a[0])
    x = x - outputs[0] * (alpha * decay + c[0])
    if len(outputs) >= 2:
        r0 = (lam[1] - lam[2]) / h
        slope = (outputs[0] - outputs[1]) / r0
    if len(outputs) == 2:
        x = x - slope * (alpha * decay / 2 + c[1])
    elif len(outputs) >= 3:
        r1 = (lam[2] - lam[3]) / h
        older = (outputs[1] - outputs[2]) / r1
        bend = (slope - older) / (r0 + r1)
        second = decay / h + 1
        x = x + (slope + bend * r0) * (alpha * second + c[1])
        x = x - bend * (alpha * (second / h - 0.5) + c[2])
    for k in range(3, len(outputs)):
        x = x + outputs[k] * c[k]
    for k in range(1, len(states)):
        x = x + states[k] * a[k]
    return x

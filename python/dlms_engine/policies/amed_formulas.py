"""The step formulas that AMED drives, written once for images and for traced forms.

Every sub-step is x' = A x + c C sum_k w_k h_k: an exponential integrator (A, C) on weighted
outputs h (newest first, sum w = 1). The solvers differ in w, in the state x they start from and in
what h is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from ..processes import EDM, Process, RectifiedFlow
from ..solvers.exponential import phi
from ..solvers.ipndm import ADAMS_BASHFORTH
from ..solvers.trace import Form
from .amed_predictor import Choice

AmedSolver = Literal["amed", "ddim", "dpm_solver_2", "ipndm", "dpm_solver_pp"]
_SOLVERS = {"amed": 1, "ddim": 1, "dpm_solver_2": 2, "ipndm": 4, "dpm_solver_pp": 3}
"""solver -> outputs it reads at most."""
MULTISTEP = ("ipndm", "dpm_solver_pp")

Value = TypeVar("Value", Tensor, Form)
BLIND_START = (
    "AMED on dpm_solver_pp works in lambda, infinite at a flow's t = 1: use solver='amed', 'ddim', "
    "'dpm_solver_2' or 'ipndm', or a flow that starts below it, RectifiedFlow(t_max=0.999)"
)


@dataclass(frozen=True)
class AmedBase:
    """The solver that is driven.

    Attributes:
        solver: "amed" (AMED-Solver) or the solver of an AMED-Plugin.
        order: of ipndm (1..4) and dpm_solver_pp (1..3); None takes the highest.
        prediction: what dpm_solver_pp interpolates; the other solvers combine noise.
        lower_order_final: dpm_solver_pp's last sub-steps use orders ..., 2, 1.
        afs: the first evaluation is the analytic x / sqrt(alpha^2 + sigma^2).
    """

    solver: AmedSolver = "amed"
    order: int | None = None
    prediction: Literal["data", "noise"] = "data"
    lower_order_final: bool = True
    afs: bool = False

    def __post_init__(self) -> None:
        if self.solver not in _SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, expected one of {sorted(_SOLVERS)}")
        highest = _SOLVERS[self.solver]
        if self.order is not None and self.solver not in MULTISTEP:
            raise ValueError(
                f"order is {self.order}, but {self.solver} has a fixed order: leave it out"
            )
        if self.order is not None and not 1 <= self.order <= highest:
            raise ValueError(f"order is {self.order}, expected 1..{highest} for {self.solver}")
        if self.prediction not in ("data", "noise"):
            raise ValueError(f"prediction is {self.prediction!r}, expected 'data' or 'noise'")

    @property
    def reads(self) -> int:
        """Outputs a sub-step combines at most."""
        return _SOLVERS[self.solver] if self.order is None else self.order

    @property
    def multistep(self) -> bool:
        return self.solver in MULTISTEP

    def stored(self, process: Process) -> Literal["data", "noise"]:
        """What the network's history holds: with noise two (AMED) to p outputs are enough."""
        if isinstance(process, RectifiedFlow):
            return "data"  # at t = 1 noise carries no information
        return self.prediction if self.solver == "dpm_solver_pp" else "noise"


class Walk(Generic[Value]):
    """One pass over the grid; ``first`` and ``second`` are called in turn for every step.

    Noise levels are sigma / alpha and the direction is the noise prediction, except for a flow,
    whose clock is t and whose direction is the velocity noise - data (both finite at t = 1).

    Args:
        scale: multiplies a value by a ``[B]`` coefficient.
        asked: ``level_range(process)`` of a grid that was checked before; None checks it, which
            reads numbers on the host.
    """

    def __init__(
        self,
        base: AmedBase,
        process: Process,
        grid: Tensor,
        scale: Callable[[Tensor, Value], Value],
        asked: tuple[float, float] | None = None,
    ) -> None:
        self.base = base
        self.process = process
        self.grid = grid
        self.flow = isinstance(process, RectifiedFlow)
        self._scale: Callable[[Tensor, Value], Value] = scale
        self._history: list[tuple[Value, Tensor]] = []  # (h, its lambda [B]), newest first
        self._middle: Tensor | None = None
        if asked is None:
            check_levels(base, process, grid)
            asked = level_range(process)
        self._range = asked

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    # -- times ----------------------------------------------------------------------------------

    def level(self, i: int) -> Tensor:
        """The clock at grid time ``i``: sigma / alpha, or t of a flow."""
        return self.grid[i] if self.flow else self.process.sigma_over_alpha(self.grid[i])

    def middle(self, i: int, choice: Choice) -> tuple[Tensor, Tensor]:
        """Times ``[B]`` of step ``i``'s middle: the state's, and the one the network is called with."""
        start, end = self.level(i), self.level(i + 1)
        if self.flow:
            level = start + choice.r * (end - start)
        else:
            level = torch.exp(choice.r * end.log() + (1 - choice.r) * start.log())
        asked = choice.scale_time * level
        if self.flow:
            return level, asked.clamp(*self._range)
        inverse = self.process.inverse_sigma
        return inverse(level), inverse(asked.clamp(*self._range))

    # -- sub-steps ------------------------------------------------------------------------------

    def analytic(self, x: Value) -> Value:
        """The output that stands for the first evaluation, at grid time 0."""
        t = self.grid[0]
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        norm = torch.sqrt(alpha**2 + sigma**2)
        if self.base.stored(self.process) == "noise":
            return self._scale(1 / norm, x)
        # (1 - sigma / norm) / alpha without the cancellation
        return self._scale(alpha / (norm * (norm + sigma)), x)

    def first(self, i: int, x: Value, m: Value, choice: Choice) -> Value:
        """State at the middle of step ``i`` from the ring quantity ``m`` at its start ``x``."""
        t = self.grid[i].expand_as(choice.r)
        self._push(self._direction(x, m, t, None), t)
        self._middle, _ = self.middle(i, choice)
        return self._move(x, t, self._middle, self._weights(2 * i, t, self._middle, None), None)

    def second(self, i: int, x: Value, y: Value, m: Value, choice: Choice) -> Value:
        """State at the end of step ``i`` from its start ``x`` and ``m`` at its middle ``y``."""
        assert self._middle is not None
        t, middle = self.grid[i].expand_as(choice.r), self._middle
        end = self.grid[i + 1].expand_as(choice.r)
        self._push(self._direction(y, m, middle, choice.scale_time), middle)
        if self.base.solver in ("amed", "dpm_solver_2"):
            return self._move(
                x, t, end, self._weights(2 * i + 1, t, end, choice.r), choice.scale_dir
            )
        return self._move(
            y, middle, end, self._weights(2 * i + 1, middle, end, None), choice.scale_dir
        )

    def rewrite(self, change: Callable[[Value], Value]) -> None:
        """Applies ``change`` to the history: detaching it, or forgetting what is not an image."""
        self._history = [(change(h), lam.detach()) for h, lam in self._history]

    def _push(self, h: Value, t: Tensor) -> None:
        lam = self.process.lambda_(t) if self.base.solver == "dpm_solver_pp" else t
        self._history.insert(0, (h, lam))
        del self._history[self.base.reads :]

    def _direction(self, x: Value, m: Value, t: Tensor, scale_time: Tensor | None) -> Value:
        """What the solver combines, from the ring quantity.

        The direction is (x - alpha D) / sigma at the state's own level, with D asked at scale_time
        times it; in terms of the stored noise prediction that is scale_time * m.
        """
        if self.flow:
            return self._scale(1 / t, x) + self._scale(-1 / t, m)
        if scale_time is None or self.base.stored(self.process) == "data":
            return m
        return self._scale(scale_time, m)

    def _move(
        self, x: Value, t: Tensor, end: Tensor, weights: list[Tensor], c: Tensor | None
    ) -> Value:
        a, gain = self._coefficients(t, end)
        gain = gain if c is None else gain * c
        x = self._scale(a, x)
        for w, (h, _) in zip(weights, self._history, strict=False):
            x = x + self._scale(gain * w, h)
        return x

    def _coefficients(self, t: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """(A, C) of x' = A x + C h for constant h."""
        if self.flow:
            return torch.ones_like(t), end - t
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        alpha_end, sigma_end = self.process.alpha(end), self.process.sigma(end)
        if self.base.stored(self.process) == "noise":
            a = alpha_end / alpha
            return a, alpha_end * (sigma_end / alpha_end - sigma / alpha)
        a = sigma_end / sigma
        return a, alpha_end - alpha * a

    def _weights(self, index: int, t: Tensor, end: Tensor, r: Tensor | None) -> list[Tensor]:
        """Weights, newest first, of sub-step ``index`` (0 .. 2 steps - 1) from ``t`` to ``end``."""
        one = torch.ones_like(end)
        held = len(self._history)
        if self.base.solver == "ipndm":
            return [w * one for w in ADAMS_BASHFORTH[held]]
        if self.base.solver == "dpm_solver_pp":
            return self._dpm_weights(self._dpm_order(index), t, end)
        if self.base.solver == "dpm_solver_2" and r is not None:
            return [1 / (2 * r), 1 - 1 / (2 * r)]
        return [one]

    def _dpm_order(self, index: int) -> int:
        """The published order rule, on the doubled grid; a short warm-up is not lowered."""
        order = self.base.reads
        if index + 1 < order or not self.base.lower_order_final:
            return min(order, index + 1)
        return min(order, 2 * self.steps - index)

    def _dpm_weights(self, order: int, t: Tensor, end: Tensor) -> list[Tensor]:
        """Weights of DPM-Solver++(kM) relative to its first-order gain (Lu et al. 2022b)."""
        lam = [value for _, value in self._history[:order]]
        h = self.process.lambda_(end) - self.process.lambda_(t)
        one = torch.ones_like(h)
        if order == 1:
            return [one]
        r0 = (lam[0] - lam[1]) / h
        if order == 2:
            return [1 + 0.5 / r0, -0.5 / r0]
        r1 = (lam[1] - lam[2]) / h
        u = -h if self.base.prediction == "data" else h
        slope, bend = phi(2, u) / phi(1, u), phi(3, u) / phi(1, u)
        newer = slope * (1 + r0 / (r0 + r1)) + bend / (r0 + r1)  # of (m0 - m1) / r0
        older = -(slope * r0 + bend) / (r0 + r1)  # of (m1 - m2) / r1
        return [1 + newer / r0, -newer / r0 + older / r1, -older / r1]


def level_range(process: Process) -> tuple[float, float]:
    """Clock values the network may be called at; an EDM network takes any level, as published."""
    if isinstance(process, EDM):
        return 0.0, math.inf
    ends = (process.t_min, process.t_max)
    if isinstance(process, RectifiedFlow):
        return ends
    low, high = (float(process.sigma_over_alpha(t)) for t in ends)
    return low, high


def check_levels(base: AmedBase, process: Process, grid: Tensor) -> None:
    """ValueError unless the middle of every step exists: 0 < sigma / alpha < infinity."""
    if isinstance(process, RectifiedFlow):
        if base.solver == "dpm_solver_pp":
            raise ValueError(BLIND_START)
        return
    ends = process.sigma_over_alpha(torch.stack([grid[0], grid[-1]]).detach())
    if not bool(((ends > 0) & ends.isfinite()).all()):
        raise ValueError(
            f"sigma / alpha is {ends.tolist()} at the grid's ends, expected positive finite "
            "numbers: the middle of a step is a geometric mean of noise levels"
        )

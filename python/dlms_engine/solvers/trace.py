"""Traced values: a solver's formula, run once on symbols, becomes a table.

A ``Form`` is a linear combination of the states the network was evaluated at and of the network's
(stored) outputs. A maker works on forms as if they were images; the trace then writes every state
in terms of the one before it, which is the row of the table.

Which coefficients exist is tracked by their presence, never by comparing numbers with zero, so a
history that is not used has weight exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..processes import Process, as_float64
from .table import Prediction, SolverTable

Scalar = float | Tensor
START = -1  # key of the state the caller hands over; 0, 1, ... are the evaluated states


class Form:
    """sum_k states[k] * X_k + sum_j outputs[j] * m_j; coefficients are float64 ``[*batch]``."""

    __slots__ = ("outputs", "states")

    def __init__(self, states: dict[int, Tensor], outputs: dict[int, Tensor]) -> None:
        self.states = states
        self.outputs = outputs

    def __add__(self, other: Form) -> Form:
        return Form(_merge(self.states, other.states), _merge(self.outputs, other.outputs))

    def __sub__(self, other: Form) -> Form:
        return self + other * -1.0

    def __mul__(self, factor: Scalar) -> Form:
        if not isinstance(factor, Tensor) and factor == 0:
            return Form({}, {})
        return Form(
            {k: v * factor for k, v in self.states.items()},
            {k: v * factor for k, v in self.outputs.items()},
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: Scalar) -> Form:
        return Form(
            {k: v / divisor for k, v in self.states.items()},
            {k: v / divisor for k, v in self.outputs.items()},
        )

    def __neg__(self) -> Form:
        return self * -1.0


class TracedOutput:
    """What one evaluation gives: the state it was made at, and both predictions as forms.

    ``x`` is the new symbol of the evaluated state: continue from it, not from the form that was
    passed in, so that weights that cancel on paper are absent and not merely small.
    """

    def __init__(
        self, x: Form, stored: Form, store: Prediction, alpha: Tensor, sigma: Tensor
    ) -> None:
        self.x = x
        self._stored = stored
        self._store = store
        self._alpha = alpha
        self._sigma = sigma

    @property
    def data(self) -> Form:
        """E[x0 | x]; from a stored noise prediction (x - sigma m) / alpha."""
        if self._store == "data":
            return self._stored
        _require_nonzero(self._alpha, "alpha", 'store="data"')
        return (self.x - self._stored * self._sigma) / self._alpha

    @property
    def noise(self) -> Form:
        """E[z | x]; from a stored data prediction (x - alpha m) / sigma."""
        if self._store == "noise":
            return self._stored
        _require_nonzero(self._sigma, "sigma", 'store="noise"')
        if _is_zero(self._alpha):
            return self.x / self._sigma
        return (self.x - self._stored * self._alpha) / self._sigma


class AnalyticOutput:
    """The analytical first step's stand-in for an evaluation: a guess linear in the state."""

    def __init__(self, x: Form, data: Form, noise: Form) -> None:
        self.x = x
        self.data = data
        self.noise = noise


class Trace:
    """Records one run of a solver on symbols.

    Args:
        process: gives alpha and sigma for the conversion between data and noise predictions.
        store: what the network's history holds, ``"data"`` or ``"noise"``.
        batch_shape: shape of every coefficient (``()`` for one table, ``[B]`` for B at once).
    """

    def __init__(
        self, process: Process, store: Prediction = "data", batch_shape: tuple[int, ...] = ()
    ) -> None:
        if store not in ("data", "noise"):
            raise ValueError(f"store is {store!r}, expected 'data' or 'noise'")
        self.process = process
        self.store: Prediction = store
        self.batch_shape = tuple(batch_shape)
        self._one = torch.ones(self.batch_shape, dtype=torch.float64, device="cpu")
        self._times: list[Tensor] = []
        self._scale: Tensor | None = None
        self._rows: list[tuple[Tensor, dict[int, Tensor]]] = []

    def start(self) -> Form:
        """The state the sampler is given."""
        return Form({START: self._one}, {})

    def evaluate(self, x: Form, t: Scalar, network_time: Scalar | None = None) -> TracedOutput:
        """One network evaluation at state ``x``.

        ``t`` is the state's time; the network is called, and predictions are converted, at
        ``network_time`` (default ``t``), as in LD3 (Tong et al. 2024, section 3.3).
        """
        n = len(self._times)
        if n == 0:
            if x.outputs or set(x.states) != {START}:
                raise ValueError("the first evaluation must be at a multiple of start()")
            self._scale = x.states[START]
        else:
            self._rows.append(self._reduce(x, n - 1))
        time = as_float64(t if network_time is None else network_time)
        self._times.append(time)
        x = Form({n: self._one}, {})
        stored = Form({}, {n: self._one})
        return TracedOutput(
            x, stored, self.store, self.process.alpha(time), self.process.sigma(time)
        )

    def analytic(self, x: Form, t: Scalar, kind: str) -> AnalyticOutput:
        """A first evaluation that costs no network call.

        ``"dockhorn"``: noise = x / sqrt(alpha^2 + sigma^2) (Dockhorn et al. 2022, section 3.2);
        ``"zero"``: data = 0, so noise = x / sigma (DLMS, Algorithm 2).
        """
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if kind == "zero" or (kind == "dockhorn" and _is_zero(alpha)):
            return AnalyticOutput(x, Form({}, {}), x / sigma)
        if kind != "dockhorn":
            raise ValueError(f"afs is {kind!r}, expected False, True, 'dockhorn' or 'zero'")
        norm = torch.sqrt(alpha**2 + sigma**2)
        # (1 - sigma / norm) / alpha without the cancellation
        return AnalyticOutput(x, x * (alpha / (norm * (norm + sigma))), x / norm)

    def _reduce(self, form: Form, n: int) -> tuple[Tensor, dict[int, Tensor]]:
        """``form`` over state n and the outputs: older states are written through younger ones."""
        states, outputs = dict(form.states), dict(form.outputs)
        for k in range(START, n):
            if k not in states:
                continue
            a, row = self._row(k)
            if bool((a.detach() == 0).any()):
                raise ValueError(
                    f"state {k} is needed after evaluation {k + 1}, whose state has weight 0 on "
                    "it: the start state cannot be eliminated"
                )
            weight = states.pop(k) / a
            states = _merge(states, {k + 1: weight})
            outputs = _merge(outputs, {j: -weight * b for j, b in row.items()})
        return states.get(n, torch.zeros_like(self._one)), outputs

    def _row(self, k: int) -> tuple[Tensor, dict[int, Tensor]]:
        if k == START:
            assert self._scale is not None
            return self._scale, {}
        return self._rows[k]

    def table(
        self, final: Form, grid: Tensor, *, name: str, options: dict[str, Any] | None = None
    ) -> SolverTable:
        """The table whose last state is ``final``; ``grid`` is ``[*batch, steps + 1]``.

        Raises:
            ValueError: no evaluation was made, or the start state cannot be eliminated.
        """
        count = len(self._times)
        if count == 0 or self._scale is None:
            raise ValueError(
                f"{name}: no network evaluation is left; an analytical first step (afs) needs one "
                "step more"
            )
        rows = [*self._rows, self._reduce(final, count - 1)]
        depth = max([n - j + 1 for n, (_, b) in enumerate(rows) for j in b], default=1)
        zero = torch.zeros_like(self._one)
        a = torch.stack([(row_a + zero) for row_a, _ in rows], dim=-1)
        b = torch.stack(
            [
                torch.stack([row_b.get(n - k, zero) + zero for k in range(depth)], dim=-1)
                for n, (_, row_b) in enumerate(rows)
            ],
            dim=-2,
        )
        grid = grid.expand(*self.batch_shape, grid.shape[-1])
        table = SolverTable(
            process=self.process,
            a=a,
            b=b,
            times=torch.stack([time + zero for time in self._times], dim=-1),
            t_start=grid[..., 0],
            t_end=grid[..., -1],
            initial_scale=self._scale + zero,
            prediction=self.store,
            name=name,
            options=dict(options or {}),
            grid=grid,
        )
        table.validate()
        return table


def _merge(left: dict[int, Tensor], right: dict[int, Tensor]) -> dict[int, Tensor]:
    merged = dict(left)
    for key, value in right.items():
        merged[key] = merged[key] + value if key in merged else value
    return merged


def _is_zero(value: Tensor) -> bool:
    return bool((value.detach() == 0).all())


def _require_nonzero(value: Tensor, what: str, remedy: str) -> None:
    if bool((value.detach() == 0).any()):
        raise ValueError(
            f"{what} is 0 at the evaluation's time, the stored prediction does not determine the "
            f"other one; use {remedy}"
        )


class OnlineTrace:
    """Turns states written as forms into rows, one at a time and for every sample of a batch.

    As ``Trace``, but online: older states are written through younger ones, without reading any
    number back from the device.
    """

    def __init__(self, batch: int, depth: int, device: torch.device) -> None:
        self._one = torch.ones(batch, dtype=torch.float64, device=device)
        self._depth = depth
        self._rows: list[tuple[Tensor, dict[int, Tensor]]] = []

    def start(self) -> Form:
        """The state the sampler is given."""
        return Form({START: self._one}, {})

    def begin(self, scale: Tensor) -> None:
        """The first evaluated state is ``scale`` times the start."""
        self._rows.append((scale.expand_as(self._one), {}))

    def symbols(self, n: int) -> tuple[Form, Form]:
        """Evaluated state and ring quantity of evaluation ``n``."""
        return Form({n: self._one}, {}), Form({}, {n: self._one})

    def reduce(self, form: Form, n: int) -> tuple[Tensor, Tensor]:
        """(a ``[B]``, b ``[B, depth]``) of ``form`` over state ``n`` and the outputs so far."""
        for k in range(START, n):
            if k in form.states:
                a, row = self._rows[k - START]
                weight = form.states[k] / a
                rest = Form({j: v for j, v in form.states.items() if j != k}, form.outputs)
                form = rest + Form({k + 1: weight}, {j: -weight * b for j, b in row.items()})
        a = form.states[n]
        self._rows.append((a, form.outputs))
        zero = torch.zeros_like(self._one)
        b = [form.outputs.get(n - k, zero) for k in range(self._depth)]
        return a, torch.stack(b, dim=-1)

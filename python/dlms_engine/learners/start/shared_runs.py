"""Many tables from the same noise, each distinct evaluation made once.

Two tables whose first rows lead to the same state call the network with the same input: all multistep
solvers on one grid share their first two evaluations, and a table whose last row alone was changed
shares all of them. States are written over the start state and the data predictions so far, in
float64, and two evaluations are one where these coefficients and the network's time agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...solvers.table import SolverTable

SMALLEST, LARGEST = 16, 8192
NUMBERS = 1 << 18
"""Samples of one network call: as many as make 2^18 numbers, within these bounds."""
LARGEST_STATE = 1 << 26
"""Numbers that all data predictions of one chunk of noise may hold (256 MiB in float32)."""

Predict = Callable[[Tensor, Tensor, range], Tensor]
"""(x [B, ...], t [B], numbers of the samples) -> E[x0 | x_t = x]."""


def expanded(table: SolverTable) -> Tensor:
    """float64 ``[rows + 1, 1 + rows]``: each state over the start state and the data predictions.

    Row n is the state of evaluation n, the last one the end; column 0 weighs the state handed to
    the sampler, column 1 + j the data prediction of evaluation j.
    """
    table = table.detach()
    if table.batch_shape:
        raise ValueError(f"table {table.name!r} is batched {table.batch_shape}, expected one table")
    rows, process = table.nfe, table.process
    alpha, sigma = process.alpha(table.times), process.sigma(table.times)
    states = torch.zeros(rows + 1, 1 + rows, dtype=torch.float64, device="cpu")
    states[0, 0] = table.initial_scale
    outputs: list[Tensor] = []
    for n in range(rows):
        data = torch.zeros(1 + rows, dtype=torch.float64, device="cpu")
        data[1 + n] = 1.0
        if table.prediction == "noise":
            data = (states[n] - alpha[n] * data) / sigma[n]
        outputs.append(data)
        states[n + 1] = table.a[n] * states[n]
        for k in range(min(table.depth, n + 1)):
            states[n + 1] += table.b[n, k] * outputs[n - k]
    return states


@dataclass
class _Node:
    """One distinct evaluation: the state it is made at and the evaluations before it."""

    weights: list[float]  # of the start state and of the ancestors' data predictions
    time: float
    path: tuple[int, ...]  # numbers of the ancestors, first evaluation first
    children: dict[tuple[Any, ...], int] = field(default_factory=dict)


@dataclass
class _End:
    weights: list[float]
    path: tuple[int, ...]


class SharedRuns:
    """The tree of distinct evaluations of ``tables``.

    Attributes:
        evaluations: network evaluations that one sample costs, over all tables.
    """

    def __init__(self, tables: Sequence[SolverTable]) -> None:
        self._nodes: list[_Node] = []
        self._levels: list[list[int]] = []
        self._ends: list[_End] = []
        roots: dict[tuple[Any, ...], int] = {}
        for table in tables:
            self._add(table, roots)
        self.evaluations = len(self._nodes)

    def _add(self, table: SolverTable, roots: dict[tuple[Any, ...], int]) -> None:
        states, times = expanded(table).tolist(), table.times.detach().tolist()
        found, path = roots, tuple[int, ...]()
        for n, time in enumerate(times):
            weights = states[n][: 1 + n]
            key = (_rounded(time), *map(_rounded, weights))
            number = found.get(key)
            if number is None:
                number = found[key] = len(self._nodes)
                self._nodes.append(_Node(weights, time, path))
                if len(self._levels) == n:
                    self._levels.append([])
                self._levels[n].append(number)
            path = (*path, number)
            found = self._nodes[number].children
        self._ends.append(_End(states[-1], path))

    def chunk(self, shape: Sequence[int]) -> int:
        """Samples of one shape that are run at a time."""
        size = max(1, len(self._nodes) + len(self._ends)) * math.prod(shape)
        return max(1, min(_batch(shape), LARGEST_STATE // size))

    @torch.no_grad()
    def ends(
        self, predict: Predict, noise: Tensor, first_number: int = 0
    ) -> Iterator[tuple[range, Tensor]]:
        """(numbers of the samples, end states ``[tables, b, ...]``), chunk by chunk of ``noise``."""
        step = self.chunk(noise.shape[1:])
        for first in range(0, len(noise), step):
            part = noise[first : first + step]
            numbers = range(first_number + first, first_number + first + len(part))
            data: dict[int, Tensor] = {}
            for level in self._levels:
                self._evaluate(predict, part, numbers, level, data)
            yield (
                numbers,
                torch.stack([_combine(end.weights, end.path, part, data) for end in self._ends]),
            )

    def _evaluate(
        self,
        predict: Predict,
        x: Tensor,
        numbers: range,
        level: Sequence[int],
        data: dict[int, Tensor],
    ) -> None:
        together = max(1, _batch(x.shape[1:]) // len(x))
        for first in range(0, len(level), together):
            nodes = [self._nodes[number] for number in level[first : first + together]]
            states = torch.stack([_combine(node.weights, node.path, x, data) for node in nodes])
            times = torch.tensor([node.time for node in nodes], dtype=torch.float64, device="cpu")
            out = _halved(predict, states, times.to(x.device), numbers)
            for number, value in zip(level[first : first + together], out, strict=True):
                data[number] = value


def _halved(predict: Predict, states: Tensor, times: Tensor, numbers: range) -> Tensor:
    """``[nodes, B, ...]`` predictions of ``states``, in one call, or in as many as memory asks for."""
    nodes, batch = states.shape[:2]
    try:
        out = predict(states.flatten(0, 1), times.repeat_interleave(batch), numbers)
    except torch.OutOfMemoryError:
        if nodes * batch == 1:
            raise
    else:
        return out.reshape(nodes, batch, *out.shape[1:])
    # here, not where it was caught: an exception keeps what it has allocated alive
    half = max(1, (nodes if nodes > 1 else batch) // 2)
    if nodes > 1:
        parts = [(states[:half], times[:half], numbers), (states[half:], times[half:], numbers)]
        return torch.cat([_halved(predict, *part) for part in parts])
    parts = [(states[:, :half], times, numbers[:half]), (states[:, half:], times, numbers[half:])]
    return torch.cat([_halved(predict, *part) for part in parts], dim=1)


def _batch(shape: Sequence[int]) -> int:
    return min(LARGEST, max(SMALLEST, NUMBERS // max(1, math.prod(shape))))


def _combine(
    weights: Sequence[float], path: Sequence[int], x: Tensor, data: dict[int, Tensor]
) -> Tensor:
    state = weights[0] * x
    for weight, number in zip(weights[1:], path, strict=False):
        if weight:
            state = state + weight * data[number]
    return state


def _rounded(value: float) -> float:
    """Twelve significant digits: makers that agree on paper differ in the last bits."""
    return float(f"{value:.11e}")

"""Runs of a table, with or without correctors, that keep their outputs or gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...policies.corrector import CorrectedPolicy, Corrector
from ...solvers.table import SolverTable
from ..start import SamplingProblem

RUN_BATCH = 128


class Runs(NamedTuple):
    """Ends of a table with the outputs that led there."""

    end: Tensor  # [B, ...]
    outputs: list[Tensor]  # newest first, each like ``end``


@torch.no_grad()
def run_keeping(
    problem: SamplingProblem, table: SolverTable, numbers: range, batch: int = RUN_BATCH
) -> Runs:
    """Runs ``table`` on the samples ``numbers`` and keeps its outputs."""
    parts = [Runs(*states_of(problem, table, part)[-1]) for part in batches(numbers, batch)]
    ends = torch.cat([p.end for p in parts])
    return Runs(
        ends, [torch.cat(column) for column in zip(*(p.outputs for p in parts), strict=True)]
    )


@torch.no_grad()
def corrected_ends(
    problem: SamplingProblem, policy: CorrectedPolicy, numbers: range, batch: int = RUN_BATCH
) -> Tensor:
    """End states ``[B, ...]`` of ``policy`` on the samples ``numbers``."""
    return torch.cat(
        [
            states_of(problem, policy.rows, part, policy.parts)[-1][0]
            for part in batches(numbers, batch)
        ]
    )


def states_of(
    problem: SamplingProblem,
    table: SolverTable,
    numbers: range,
    correctors: Sequence[Corrector] = (),
    weights: tuple[Tensor, Tensor] | None = None,
) -> list[tuple[Tensor, list[Tensor]]]:
    """After each row: the state ``[B, ...]``, corrected, and the outputs, newest first.

    Args:
        correctors: of the last rows, in order.
        weights: a ``[rows]`` and b ``[rows, depth]`` in place of the table's, with gradient.
    """
    a, b = (table.a, table.b) if weights is None else weights
    x = problem.noise(numbers) * float(table.initial_scale)
    a, b = a.to(x), b.to(x)
    first = table.nfe - len(correctors)
    outputs: list[Tensor] = []
    states = []
    for n in range(table.nfe):
        time = table.times[n].to(x.device)
        outputs = [problem.predict(x, time, numbers, table.prediction), *outputs]
        outputs = outputs[: table.depth]
        x = a[n] * x
        for k, m in enumerate(outputs):
            x = x + b[n, k] * m
        if n >= first:
            x = correctors[n - first](x, outputs)
        states.append((x, outputs))
    return states


def batches(numbers: range, size: int) -> list[range]:
    """``numbers`` in pieces of at most ``size``."""
    return [
        range(low, min(low + size, numbers.stop))
        for low in range(numbers.start, numbers.stop, size)
    ]

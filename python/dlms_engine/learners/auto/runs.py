"""Runs of a table that keep their outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...solvers.table import SolverTable
from ..start import SamplingProblem


class Runs(NamedTuple):
    """Ends of a table with the outputs that led there."""

    end: Tensor  # [B, ...]
    outputs: list[Tensor]  # newest first, each like ``end``


@torch.no_grad()
def run_keeping(
    problem: SamplingProblem, table: SolverTable, numbers: range, batch: int = 128
) -> Runs:
    """Runs ``table`` on the samples ``numbers`` and keeps its outputs."""
    parts = []
    for low in range(numbers.start, numbers.stop, batch):
        part = range(low, min(low + batch, numbers.stop))
        x = problem.noise(part) * float(table.initial_scale)
        outputs: list[Tensor] = []
        for n in range(table.nfe):
            time = table.times[n].to(x.device)
            outputs.insert(0, problem.predict(x, time, part, table.prediction))
            x = float(table.a[n]) * x
            for k, m in enumerate(outputs[: table.depth]):
                x = x + float(table.b[n, k]) * m
        parts.append(Runs(x, outputs[: table.depth]))
    ends = torch.cat([p.end for p in parts])
    return Runs(
        ends, [torch.cat(column) for column in zip(*(p.outputs for p in parts), strict=True)]
    )

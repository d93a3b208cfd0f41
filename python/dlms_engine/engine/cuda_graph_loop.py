"""A table's run as one step over and over, for a captured loop (``csrc/cuda/graph_run.h``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.denoiser import Denoiser
from .cuda_graph_capture import Inputs, StepLoop
from .steps import evaluate, first_input


def table_loop(
    denoiser: Denoiser,
    depth: int,
    network_dtype: torch.dtype,
    backend: ops.Backend,
    conditioning: Callable[[Inputs], dict[str, Any]],
) -> StepLoop:
    """The loop over inputs ``x``, ``plan/c_in``, ``plan/rows`` and ``plan/c_noise``.

    Row and noise level are selected on the device by the number of the step; the ring slot is a
    column of the row. ``conditioning`` makes the network's keywords from the inputs.
    """

    def first(given: Inputs) -> tuple[Tensor, Tensor]:
        x = given["x"]
        ring = x.new_empty((depth, *x.shape))
        return ring, first_input(x, given["plan/c_in"], network_dtype).contiguous()

    def step(given: Inputs, carried: tuple[Tensor, Tensor], number: Tensor) -> None:
        ring, network_input = carried
        level = given["plan/c_noise"].index_select(0, number).squeeze(0)
        row = given["plan/rows"].index_select(0, number).squeeze(0)
        out = evaluate(denoiser, network_input, level, conditioning(given))
        f, f_cond = (out, None) if isinstance(out, Tensor) else out
        backend(f, f_cond, given["x"], ring, row, network_input)

    return StepLoop(first, step, "x", ("plan/rows", "plan/c_noise"))

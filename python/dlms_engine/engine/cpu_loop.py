"""The compiled sampling loop for the CPU: Python is entered once an evaluation, for the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import BackendUnavailable
from .native import native as _native
from .native import problem as _problem

Network = Callable[[int, Tensor], Any]
"""(n, network_input) -> F or (F_unconditional, F_conditional), contiguous, in its own dtype."""


def loop_available() -> bool:
    """Whether the compiled loop is part of this installation."""
    return _native is not None


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels ("avx512", "avx2", "baseline"); None without them."""
    return None if _native is None else str(_native.cpu_isa())


class Engine:
    """Runs rows on states of one shape; all memory is allocated here, none while sampling.

    Args:
        shape: ``[B, ...]`` of the state.
        depth: history slots, as in the rows.
        state_dtype: float32, or float64 for verification.
        network_dtype: dtype of the network's input and output: float32, bfloat16 or float16
            (float64 with a float64 state).

    An engine is for one thread at a time and may be kept and used again for any rows of its depth.

    Raises:
        BackendUnavailable: this installation has no compiled loop.
        ValueError: a shape, depth or dtype that it does not take.
    """

    def __init__(
        self,
        shape: Sequence[int],
        depth: int,
        *,
        state_dtype: torch.dtype = torch.float32,
        network_dtype: torch.dtype = torch.float32,
    ) -> None:
        if _native is None:
            raise BackendUnavailable(
                f"the compiled sampling loop is not available ({_problem}): build dlms_engine with "
                "a C++ compiler, or pass backend='eager'"
            )
        self.shape = tuple(int(size) for size in shape)
        self.depth = depth
        self.state_dtype = state_dtype
        self.network_dtype = network_dtype
        with torch.inference_mode(False):  # callbacks of later runs may write into the buffers
            self.loop = _native.SamplingLoop(depth, list(self.shape), state_dtype, network_dtype)

    def run(
        self,
        x0: Tensor,
        rows: Tensor | int,
        network: Network,
        *,
        c_in: Tensor | float = 1.0,
        row_fn: Callable[[int], Tensor] | None = None,
        callback: Callable[[int, Tensor], object] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Samples from ``x0`` and returns the end state, ``[B, ...]`` (``out``, if given).

        Args:
            x0: ``[B, ...]`` contiguous CPU tensor in the state dtype.
            rows: ``[n, 6 + depth]`` or ``[n, B, 6 + depth]`` in the state dtype, from
                ``ops.pack_rows``; the number of rows if there is a ``row_fn``.
            network: called as ``network(n, network_input)``. The input is a live buffer that the
                next row overwrites: clone it to keep it, and do not write to it.
            c_in: scale of the first network input, a number, ``[]`` or ``[B]``.
            row_fn: called for row ``n`` after evaluation ``n``: ``[6 + depth]``, or
                ``[B, 6 + depth]``.
            callback: called as ``callback(n, state)`` after each row; the state is a live buffer.

        What ``network``, ``row_fn`` or ``callback`` raise is passed on; the engine can be used
        again.

        Raises:
            ValueError: a tensor of the wrong shape, dtype, device or layout; the message has both.
            RuntimeError: the engine is running already.
        """
        if x0.requires_grad:
            raise ValueError(
                "x0 requires grad, but the compiled loop keeps no graph: pass x0.detach(), or use "
                "dlms_engine.engine.rollout for gradients"
            )
        numbers = (
            c_in
            if isinstance(c_in, Tensor)
            else torch.tensor(c_in, dtype=torch.float64, device="cpu")
        )
        first = numbers.to(self.state_dtype).contiguous()
        with torch.no_grad():
            self.loop.run(x0, first, rows, network, row_fn, callback)
            state: Tensor = self.loop.state
            return state.clone() if out is None else out.copy_(state)

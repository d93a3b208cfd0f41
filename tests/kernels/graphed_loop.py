"""A sampling loop over functions of a test: plain, or one captured run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dlms_engine import ops
from dlms_engine.engine import cuda_graph
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.cuda_graph_capture import Inputs

StepNetwork = Callable[[int, Tensor, Inputs], "Tensor | tuple[Tensor, Tensor]"]
RowFunction = Callable[[int, Inputs], Tensor]
Mode = Literal["auto", "always", "never"]


class GraphedLoop:
    """The sampling loop of `n_rows` evaluations, replayed as one graph where it can be captured.

    Args:
        step_network: ``(n, network_input [B, ...], inputs) -> F`` or ``(F_uncond, F_cond)``; what
            varies between runs (noise levels, labels) must come from ``inputs``, not from closures.
        row_fn: ``(n, inputs) -> row [R] or [B, R]`` after evaluation n, in torch operations on the
            device (a designer network); None when ``run`` is given the rows.
        shape: ``(B, ...)`` of the state.
        depth: ring slots.
        n_rows: network evaluations.
        dtype: of state, ring and rows; ``network_dtype`` (default ``dtype``) of the network's side.
        backend: of the fused row, as in ``ops.select``.
        network: whose identity keys the cache; by default ``step_network`` itself.
        mode: ``"auto"`` captures where it can, ``"always"`` raises ``GraphCaptureError`` where it
            cannot, ``"never"`` runs the plain loop.
        options: whatever else the closures depend on (guidance scale, feature taps), hashable.
    """

    def __init__(
        self,
        step_network: StepNetwork,
        row_fn: RowFunction | None,
        shape: Sequence[int],
        depth: int,
        n_rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        network_dtype: torch.dtype | None = None,
        backend: str = "auto",
        network: Any = None,
        cache: GraphCache | None = None,
        mode: Mode = "auto",
        options: tuple[Any, ...] = (),
    ) -> None:
        self.step_network = step_network
        self.row_fn = row_fn
        self.shape = tuple(shape)
        self.depth = depth
        self.n_rows = n_rows
        self.dtype = dtype
        self.network_dtype = network_dtype or dtype
        self.backend = backend
        self.network = step_network if network is None else network
        self.cache = GraphCache() if cache is None else cache
        self.mode = mode
        self.options = options

    def run(
        self,
        x0: Tensor,
        rows: Tensor | None = None,
        *,
        first_scale: Tensor | float = 1.0,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """The state after all rows, a new tensor ``[B, ...]``; ``x0`` is left alone.

        Args:
            x0: ``[B, ...]`` the start state.
            rows: ``[n_rows, R]`` or ``[n_rows, B, R]``; None with a ``row_fn``.
            first_scale: ``[]`` or ``[B]``, scale of the first network input (c_in of evaluation 0).
            inputs: named tensors on x0's device that the network or ``row_fn`` reads.

        Raises:
            GraphCaptureError: mode is "always" and it cannot be.
        """
        given = self._gather(x0, rows, first_scale, inputs or {})
        if self.mode == "never":
            return cuda_graph.plainly(self._body, given)
        modules = () if self.row_fn is None else (self.row_fn,)
        if self.mode == "auto":
            return cuda_graph.run_captured(
                self.cache, self.network, self._options(), self._body, given, modules
            )
        reason = cuda_graph.obstacle(x0.device)
        if reason is None:
            this = cuda_graph.Runnable(self.network, self._options(), self._body, given, modules)
            output, reason = cuda_graph.try_captured(self.cache, this)
            if output is not None:
                return output
        raise cuda_graph.GraphCaptureError(f"{reason}; pass mode='auto' to run without a graph")

    def _options(self) -> tuple[Any, ...]:
        return (self.depth, self.n_rows, self.network_dtype, self.backend, *self.options)

    def _gather(
        self, x0: Tensor, rows: Tensor | None, first_scale: Tensor | float, inputs: Inputs
    ) -> dict[str, Tensor]:
        scale = torch.as_tensor(first_scale, dtype=self.dtype, device=x0.device)
        given = {"x": x0.to(self.dtype).contiguous(), "first_scale": scale, **inputs}
        if rows is not None:
            given["rows"] = rows.to(self.dtype)
        return given

    def _body(self, inputs: Inputs) -> Tensor:
        """The plain loop; overwrites ``inputs["x"]`` and returns it."""
        x = inputs["x"]
        ring = x.new_empty((self.depth, *x.shape))
        scale = inputs["first_scale"]
        scale = scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale
        network_input = (scale * x).to(self.network_dtype).contiguous()
        fused_row_ = ops.select(self.backend, x.device).fused_row_
        for n in range(self.n_rows):
            out = self.step_network(n, network_input, inputs)
            f, f_cond = (out, None) if isinstance(out, Tensor) else out
            row = inputs["rows"][n] if self.row_fn is None else self.row_fn(n, inputs)
            f = f.to(self.network_dtype)
            f_cond = None if f_cond is None else f_cond.to(self.network_dtype)
            fused_row_(f, f_cond, x, ring, row.to(self.dtype), network_input)
        return x

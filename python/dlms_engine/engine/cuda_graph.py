"""A whole sampling run as one CUDA graph: network, guidance and fused rows of every evaluation.

`CapturedRun` captures any function of named tensors; `GraphedLoop` is the sampling loop on top,
with a cache of captures and, in mode "auto", the plain loop where a capture cannot be had. New
tables, noise and conditioning of the same shapes are copied into the captured buffers: no new
capture.
Importing this module needs no GPU.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from .cuda_graph_cache import GraphCache, graph_key

log = logging.getLogger("dlms_engine")

Inputs = Mapping[str, Tensor]
Body = Callable[[Inputs], Tensor]
StepNetwork = Callable[[int, Tensor, Inputs], "Tensor | tuple[Tensor, Tensor]"]
RowFunction = Callable[[int, Inputs], Tensor]
Mode = Literal["auto", "always", "never"]

_capturing = threading.Lock()  # torch captures on one stream that all captures share
WARMUP = 3  # runs before a capture: lazy initialisation, autotuning and torch.compile happen there


class GraphCaptureError(RuntimeError):
    """The run cannot be captured as a CUDA graph; the message says why and what to do."""


_REASONS = (
    (
        ("unsafe", "not permitted when stream is capturing", "capture unsupported", "is capturing"),
        "it makes the host wait for the GPU or touches another stream: look for .item(), .cpu(), "
        ".tolist(), nonzero, a Python `if` on a tensor's value, or a print of one",
    ),
    (
        ("copy between cpu and cuda", "pin_memory", "pinned"),
        "it copies from CPU memory: make such tensors once, on the GPU, before the run",
    ),
    (
        ("generator", "philox", "offset increment"),
        "it draws random numbers from a generator that the capture does not know: register it, or "
        "make the network deterministic (eval mode)",
    ),
    (("out of memory",), "the captured run does not fit the GPU's memory: lower the batch size"),
)


def explain(exc: BaseException) -> str:
    """In words, why a capture failed with `exc`.

    The error that ends a capture often hides the one that broke it, so that one is read too.
    """
    chain = [exc]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    text = "\n".join(str(e) for e in chain).lower()
    for fragments, reason in _REASONS:
        if any(fragment in text for fragment in fragments):
            return reason
    first = (str(chain[-1]).strip() or "no message").splitlines()[0]
    return f"it failed with {type(chain[-1]).__name__}: {first}"


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be captured on `device` at this moment, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need tensors on an NVIDIA GPU, these are on {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing; it may capture on its own (mode='reduce-overhead')"
    if torch.cuda.is_current_stream_capturing():
        return "the current stream is already capturing; the run becomes part of that graph"
    return None


class CapturedRun:
    """`body` captured on copies of `inputs`; call it with new values of the same shapes.

    Safe to call from several threads and streams: the lock orders the host, an event the GPU, so
    that no call overwrites the buffers of one still running.
    """

    def __init__(self, body: Body, inputs: Inputs, warmup: int = WARMUP) -> None:
        self._lock = threading.Lock()
        self._device = next(iter(inputs.values())).device
        with torch.cuda.device(self._device), torch.no_grad():
            reserved = torch.cuda.memory_reserved(self._device)
            self._inputs = {name: t.detach().clone() for name, t in inputs.items()}
            self._warm_up(body, inputs, warmup)
            self._graph = torch.cuda.CUDAGraph()
            self._done = torch.cuda.Event()
            try:
                # thread_local: other threads may go on using the GPU meanwhile.
                with (
                    _capturing,
                    torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
                ):
                    self._output = body(self._inputs)
            except Exception as exc:
                torch.cuda.synchronize(self._device)
                raise GraphCaptureError(f"the run cannot be captured: {explain(exc)}") from exc
            grown = torch.cuda.memory_reserved(self._device) - reserved
        held = sum(t.nbytes for t in (*self._inputs.values(), self._output))
        self.nbytes = max(grown, held)

    def _warm_up(self, body: Body, inputs: Inputs, warmup: int) -> None:
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(warmup):
                self._fill(inputs)  # the body may overwrite its inputs
                body(self._inputs)
        torch.cuda.current_stream(self._device).wait_stream(side)

    def _fill(self, inputs: Inputs) -> None:
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The output for `inputs`, a new tensor. Shapes, dtypes and names as at the capture."""
        with self._lock, torch.cuda.device(self._device), torch.no_grad():
            torch.cuda.current_stream(self._device).wait_event(self._done)
            self._fill(inputs)
            self._graph.replay()
            output = self._output.clone()
            self._done.record(torch.cuda.current_stream(self._device))
            return output


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
        if mode not in ("auto", "always", "never"):
            raise ValueError(f"mode is {mode!r}, expected 'auto', 'always' or 'never'")
        if n_rows < 1 or depth < 1:
            raise ValueError(f"n_rows is {n_rows} and depth {depth}, expected both at least 1")
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
            ValueError: a shape does not fit. GraphCaptureError: mode is "always" and it cannot be.
        """
        given = self._gather(x0, rows, first_scale, inputs or {})
        reason = "mode is 'never'" if self.mode == "never" else obstacle(x0.device)
        if reason is None:
            key = graph_key(self.network, given, self._options())
            reason = self.cache.failure(key)
            if reason is None:
                try:
                    captured = self.cache.get(key, lambda: CapturedRun(self._body, given))
                    assert isinstance(captured, CapturedRun)
                    return captured(given)
                except GraphCaptureError as exc:
                    reason = str(exc)
                    self.cache.fail(key, reason)
                    if self.mode == "auto":
                        log.warning("sampling without a CUDA graph: %s", reason)
        if self.mode == "always":
            raise GraphCaptureError(f"{reason}; pass mode='auto' to run without a graph")
        with torch.no_grad():
            return self._body({**given, "x": given["x"].clone()})

    def _options(self) -> tuple[Any, ...]:
        rows_from = None if self.row_fn is None else id(self.row_fn)
        return (self.depth, self.n_rows, self.network_dtype, self.backend, rows_from, *self.options)

    def _gather(
        self, x0: Tensor, rows: Tensor | None, first_scale: Tensor | float, inputs: Inputs
    ) -> dict[str, Tensor]:
        if tuple(x0.shape) != self.shape:
            raise ValueError(f"x0 is {tuple(x0.shape)}, this loop was made for {self.shape}")
        if (rows is None) == (self.row_fn is None):
            raise ValueError("give rows to run() or row_fn to GraphedLoop, one of the two")
        reserved = {"x", "rows", "first_scale"} & set(inputs)
        if reserved:
            raise ValueError(f"inputs may not be called {sorted(reserved)}: the loop uses these")
        scale = torch.as_tensor(first_scale, dtype=self.dtype, device=x0.device)
        given = {**inputs, "x": x0.to(self.dtype).contiguous(), "first_scale": scale}
        if rows is not None:
            if rows.ndim not in (2, 3) or rows.shape[0] != self.n_rows:
                raise ValueError(
                    f"rows are {tuple(rows.shape)}, expected [{self.n_rows}, R] or "
                    f"[{self.n_rows}, {self.shape[0]}, R]"
                )
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


def run_captured(
    cache: GraphCache, network: Any, options: tuple[Any, ...], body: Body, inputs: Inputs
) -> Tensor:
    """``body(inputs)``, replayed as a graph where it can be captured; the plain call elsewhere.

    ``body`` may overwrite its inputs. A capture that fails is tried once, told once and remembered.
    """
    device = next(iter(inputs.values())).device
    if obstacle(device) is None:
        key = graph_key(network, inputs, options)
        if cache.failure(key) is None:
            try:
                captured = cache.get(key, lambda: CapturedRun(body, inputs))
                assert isinstance(captured, CapturedRun)
                return captured(inputs)
            except GraphCaptureError as exc:
                cache.fail(key, str(exc))
                log.warning("sampling without a CUDA graph: %s", exc)
    with torch.no_grad():
        return body({**inputs, "x": inputs["x"].clone()})

"""A whole sampling run as one CUDA graph: network, guidance and fused rows of every evaluation.

`run_captured` captures any function of named tensors, replays it, and runs it plainly where it cannot be
captured. New tables, noise and conditioning of the same shapes are copied to its buffers: no new capture.

Recording is in `cuda_graph_capture.py`; what a graph depends on and which are kept in
`cuda_graph_cache.py`; the run itself, one call, in C++ (``csrc/cuda/graph_run.h``).
Importing this module needs no GPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import libraries
from . import cuda_graph_capture as capture
from .cuda_graph_cache import GraphCache, graph_key, ignore_tensor_attributes, token
from .cuda_graph_capture import Body, GraphCaptureError, Inputs, explain
from .cuda_graph_fallback import TorchRun
from .native import native, problem

__all__ = [
    "CapturedRun",
    "GraphCaptureError",
    "StaleGraphError",
    "explain",
    "obstacle",
    "run_captured",
]

_log = logging.getLogger("dlms_engine")

_DRIVER_ERRORS: tuple[type[Exception], ...] = () if native is None else (native.DriverError,)
_shown: set[Any] = set()  # reasons that have been logged
_shown_lock = threading.Lock()


class StaleGraphError(RuntimeError):
    """A captured run no longer gives what running the network gives."""


def _show_once(subject: Any, text: str) -> None:
    with _shown_lock:
        fresh = (subject, text) not in _shown
        _shown.add((subject, text))
    if fresh:
        _log.warning("sampling without a CUDA graph: %s", text)


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be captured on `device` at this moment, or None."""
    if device.type != "cuda":
        return f"CUDA graphs need tensors on an NVIDIA GPU, these are on {device}"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing; it may capture on its own (mode='reduce-overhead')"
    if torch.cuda.is_current_stream_capturing():
        return "the current stream is already capturing; the run becomes part of that graph"
    return None


class CapturedRun:
    """`body` captured on buffers like `inputs`; call it with new values of the same shapes.

    Safe to call from several threads and streams: each run of one graph waits, on the device, for the
    one before it.

    Args:
        body: a function of named tensors, which it may overwrite.
        inputs: on one CUDA device, the state first.
        network: named in messages where it cannot be captured.
        rekey: returns the key of the run at this moment; it must not change from run to run.

    Raises:
        GraphCaptureError: it cannot be captured.
    """

    def __init__(
        self,
        body: Body,
        inputs: Inputs,
        network: Any = None,
        rekey: Callable[[], Any] = lambda: None,
    ) -> None:
        self.device = next(iter(inputs.values())).device
        _same_device(inputs)
        self._index = capture.device_index(self.device)
        keys: list[Any] = []
        with capture.CAPTURING, capture.capture_state(self.device):
            try:
                self.plain_seconds = capture.warm_up(
                    body, inputs, network, self.device, lambda: keys.append(rekey())
                )
            except torch.OutOfMemoryError as exc:
                raise GraphCaptureError(f"the run cannot be captured: {explain(exc)}") from exc
            self._require_settled(keys, network, body, inputs)
            self._recorded, self._run = self._record(body, inputs)
        self.nbytes = self._recorded.nbytes
        self.graph_seconds = 0.0

    def _require_settled(self, keys: list[Any], network: Any, body: Body, inputs: Inputs) -> None:
        """The key must be the same before and after a run; ``keys`` are (key, without tensors)."""
        if keys[0] == keys[-1]:
            return
        if keys[0] is not None and keys[0][1] == keys[-1][1]:
            ignore_tensor_attributes(network)  # it keeps an activation; that is no setting
            return
        name = capture.changing_attribute(network, body, inputs)
        raise UnsettledNetworkError(
            f"the network changes {name} in every run, which a captured run would not: keep such "
            "counters outside of it"
        )

    def _record(self, body: Body, inputs: Inputs) -> tuple[capture.Recorded, Any]:
        recorded = capture.record_run(body, inputs, self.device)
        return recorded, _make_run(recorded, self._index)

    @property
    def nodes(self) -> int | None:
        """Nodes of the graph, without the copies around it; None without the compiled part."""
        return getattr(self._run, "nodes", None)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The output for `inputs`, a new tensor. Shapes, dtypes, devices and names as captured."""
        output = torch.empty_like(self._recorded.output)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        values = tuple(t if t.is_contiguous() else t.contiguous() for t in inputs.values())
        self._run.launch(values, output, stream)
        return output

    def first(self, inputs: Inputs) -> Tensor:
        """As a call, timed: `graph_seconds` is what it took, the GPU's work included."""
        with torch.cuda.device(self.device):
            try:
                self._run.upload(torch._C._cuda_getCurrentRawStream(self._index))
                output, self.graph_seconds = self._timed(inputs)
            except _DRIVER_ERRORS as exc:
                raise GraphCaptureError(f"the captured run does not start: {exc}") from exc
        return output

    def _timed(self, inputs: Inputs) -> tuple[Tensor, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = self(inputs)
        torch.cuda.synchronize()
        return output, time.perf_counter() - start

    def best_seconds(self, inputs: Inputs, runs: int = 5) -> float:
        """The shortest of some runs, for comparing ways to run the same thing."""
        with torch.cuda.device(self.device):
            return min(self._timed(inputs)[1] for _ in range(runs))


class LoopedRun(CapturedRun):
    """One captured step under a WHILE node: one capture for any number of steps up to 64.

    Args:
        loop: what a step is; ``body`` is the same run as plain calls.
    """

    def __init__(
        self,
        body: Body,
        inputs: Inputs,
        network: Any,
        rekey: Callable[[], Any],
        loop: capture.StepLoop,
    ) -> None:
        self._loop = loop
        self._counts: dict[int, Tensor] = {}
        super().__init__(body, inputs, network, rekey)

    def _record(self, body: Body, inputs: Inputs) -> tuple[capture.Recorded, Any]:
        recorded, number, count = capture.record_loop(self._loop, inputs, self.device)
        first, step = (graph.raw_cuda_graph() for graph in recorded.graphs)
        buffers = (*recorded.inputs.values(), count)
        try:
            kernel = native.loop_kernel(loop_library(), self._index)
            graph = native.loop_graph(first, step, kernel, number, count, self._index)
            return recorded, native.GraphRun(
                graph, buffers, recorded.output, self._index, take=True
            )
        except (native.DriverError, ValueError) as exc:
            raise GraphCaptureError(f"the run cannot be captured as a loop: {exc}") from exc

    def __call__(self, inputs: Inputs) -> Tensor:
        steps = len(inputs[self._loop.per_step[0]])
        count = self._counts.get(steps)
        if count is None:
            count = torch.tensor([steps], dtype=torch.int32, device=self.device)
            self._counts[steps] = count
        return super().__call__({**inputs, "steps": count})


def loop_library() -> str:
    """The library that holds the loop's kernel."""
    path = libraries.find("_ops_cuda")
    if path is None:
        raise GraphCaptureError("a loop needs the CUDA operators, which were not built")
    return str(path)


class UnsettledNetworkError(GraphCaptureError):
    """The network's own attributes differ from run to run."""


def _make_run(recorded: capture.Recorded, index: int) -> Any:
    (graph,), buffers = recorded.graphs, tuple(recorded.inputs.values())
    if native is None:
        _show_once("native", f"without the compiled part ({problem}) graphs run through torch")
        return TorchRun(graph, buffers, recorded.output)
    try:
        return native.GraphRun(graph.raw_cuda_graph(), buffers, recorded.output, index)
    except (native.DriverError, ValueError) as exc:  # ValueError: an input without elements
        raise GraphCaptureError(f"the run cannot be captured: {exc}") from exc


def _same_device(inputs: Inputs) -> None:
    device = next(iter(inputs.values())).device
    for name, value in inputs.items():
        if value.device != device:
            raise GraphCaptureError(
                f"input {name!r} is on {value.device}, the state on {device}: a graph would not see "
                "new values; move it there"
            )


def run_captured(
    cache: GraphCache,
    network: Any,
    options: tuple[Any, ...],
    body: Body,
    inputs: dict[str, Tensor],
    modules: tuple[Any, ...] = (),
    loop: capture.StepLoop | None = None,
) -> Tensor:
    """``body(inputs)``, replayed as a graph where it can be captured; the plain call elsewhere.

    ``body`` may overwrite its inputs; the caller's are left alone. A capture that fails is tried
    once, told once and remembered.

    Args:
        network: owner of the graph, see ``graph_key``; ``options`` and ``modules`` too.
        inputs: named tensors on one device, the state ``"x"`` first.
        loop: the same run step by step, for caches whose ``loop`` is not "never".
    """
    run = Runnable(network, options, body, inputs, modules)
    if loop is not None and cache.loop != "never" and native is not None:
        output, reason = _try_captured(cache, run._replace(loop=loop))
        if output is not None:
            return output
        if reason is not None and cache.loop == "always":
            _show_once(token(network), reason)
    output, reason = _try_captured(cache, run)
    if output is not None:
        return output
    if reason is not None:
        _show_once(token(network), reason)
    return _plainly(body, inputs)


class Runnable(NamedTuple):
    """A run that may be captured."""

    network: Any
    options: tuple[Any, ...]
    body: Body
    inputs: dict[str, Tensor]
    modules: tuple[Any, ...] = ()
    loop: capture.StepLoop | None = None

    def key(self, tensors: bool | None = None) -> tuple[Any, str]:
        """As ``graph_key``; a loop's does not depend on the number of steps."""
        inputs, options = self.inputs, self.options
        if self.loop is not None:
            per_step = [(k, inputs[k].shape[1:], inputs[k].dtype) for k in self.loop.per_step]
            inputs = {k: v for k, v in inputs.items() if k not in self.loop.per_step}
            options = (*options, "loop", per_step)
        return graph_key(self.network, inputs, options, self.modules, tensors)

    def capture(self) -> CapturedRun:
        """Raises ``GraphCaptureError``."""
        if self.loop is None:
            return CapturedRun(self.body, self.inputs, self.network, self._rekey)
        steps = len(self.inputs[self.loop.per_step[0]])
        if steps > capture.MAX_STEPS:
            raise GraphCaptureError(f"a loop has at most {capture.MAX_STEPS} steps, not {steps}")
        return LoopedRun(self.body, self.inputs, self.network, self._rekey, self.loop)

    def _rekey(self) -> Any:
        return self.key(True)[0], self.key(False)[0]


def _plainly(body: Body, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return body({**inputs, "x": inputs["x"].clone(memory_format=torch.contiguous_format)})


def _try_captured(cache: GraphCache, this: Runnable) -> tuple[Tensor | None, str | None]:
    """(output, None), or (None, why there is none; None if that needs no telling)."""
    if obstacle(next(iter(this.inputs.values())).device) is not None:
        return None, None
    while True:
        key, stray = this.key()
        run = cache.runs.find(key)
        if run is not None:
            return _replay(cache, run, this), None
        if stray:
            return None, (
                f"parameter {stray} is not on the state's device (offloaded?): a graph would read the "
                "memory that it leaves"
            )
        claim, run, reason = cache.runs.claim(key)
        if claim == "found":
            return _replay(cache, run, this), None
        if claim == "failed":
            return None, reason
        if claim == "mine":
            return _capture(cache, key, this)


def _capture(cache: GraphCache, key: Any, this: Runnable) -> tuple[Tensor | None, str | None]:
    """Ends the claim on `key`, with a graph or the reason why there is none."""
    try:
        run = this.capture()
        output = run.first(this.inputs)
        if this.loop is not None:
            _require_right(output, this)
            if cache.loop == "auto":
                _prefer_loop(run, this)
    except GraphCaptureError as exc:
        cache.runs.fail(key, str(exc), isinstance(exc, UnsettledNetworkError))
        return None, str(exc)
    except BaseException:
        cache.runs.release(key)
        raise
    # The first run of a network may have filled in attributes that are part of the key.
    settled, _ = this.key()
    cache.runs.put(key, settled, run, run.nbytes)
    cache.runs.measured(settled, run.plain_seconds, run.graph_seconds)
    return output, None


def _require_right(output: Tensor, this: Runnable) -> None:
    """GraphCaptureError unless a new loop gives what the plain run does."""
    try:
        _verify(output, _plainly(this.body, this.inputs))
    except StaleGraphError as exc:
        raise GraphCaptureError(f"the captured loop is wrong here: {exc}") from exc


def _prefer_loop(looped: CapturedRun, this: Runnable) -> None:
    """GraphCaptureError if the same run unrolled is more than 2 % faster."""
    unrolled = this._replace(loop=None).capture()
    unrolled.first(this.inputs)
    ours, theirs = (run.best_seconds(this.inputs) for run in (looped, unrolled))
    if ours > 1.02 * theirs:
        raise GraphCaptureError(
            f"unrolled it takes {1e6 * theirs:.0f} us, as a loop {1e6 * ours:.0f} us"
        )


def _replay(cache: GraphCache, run: CapturedRun, this: Runnable) -> Tensor:
    output = run(this.inputs)
    if cache.verify and cache.stats()["replays"] % cache.verify == 0:
        _verify(output, _plainly(this.body, this.inputs))
    return output


def _verify(output: Tensor, expected: Tensor) -> None:
    """StaleGraphError unless they agree as two runs of one network do.

    A captured run may use other algorithms of the same libraries: 1e-2 of the largest value is the
    bound, above what TF32 or half precision add up to in a few evaluations.
    """
    scale = expected.abs().max().item()
    error = (output - expected).abs().max().item()
    if not error <= 1e-2 * scale:
        raise StaleGraphError(
            f"a captured run differs from the plain one by {error:.3g} (largest value {scale:.3g}): "
            "something that the graph has frozen was changed. Call GraphCache.invalidate(network) "
            "after such a change, or sample without a graph"
        )

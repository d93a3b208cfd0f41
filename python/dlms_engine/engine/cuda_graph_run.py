"""A captured run: a graph on buffers of its own, called with new values; unrolled, or as a loop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import libraries
from . import cuda_graph_capture as capture
from .cuda_graph_cache import ignore_tensor_attributes
from .cuda_graph_capture import Body, Inputs
from .cuda_graph_check import GraphCaptureError, device_index, explain
from .cuda_graph_fallback import TorchRun
from .native import native, problem

_log = logging.getLogger("dlms_engine")

_DRIVER_ERRORS: tuple[type[Exception], ...] = () if native is None else (native.DriverError,)
_shown: set[Any] = set()  # reasons that have been logged
_shown_lock = threading.Lock()


def show_once(subject: Any, text: str, doing: str = "sampling") -> None:
    with _shown_lock:
        fresh = (subject, doing, text) not in _shown
        _shown.add((subject, doing, text))
    if fresh:
        _log.warning("%s without a CUDA graph: %s", doing, text)


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
        self._index = device_index(self.device)
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
        show_once("native", f"without the compiled part ({problem}) graphs run through torch")
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

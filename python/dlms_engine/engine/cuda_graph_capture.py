"""Recording a run as a CUDA graph: warm-up, whose last run is watched, and the capture itself."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .cuda_graph_check import (
    RANDOM,
    CaptureCheck,
    GraphCaptureError,
    device_index,
    device_offset,
    explain,
)
from .native import native

Inputs = Mapping[str, Tensor]
Body = Callable[[Inputs], Tensor]


class OneAtATime:
    """A lock that knows whether this thread holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread is capturing: what it calls becomes part of that graph."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()


# One capture at a time in a process: torch's allocator and cuBLAS workspaces are shared.
CAPTURING = OneAtATime()
_streams: dict[int, torch.cuda.Stream] = {}


def changing_attribute(network: Any, body: Body, inputs: Inputs) -> str:
    """The name of a plain attribute that a run of `body` changes, for a message."""

    def settings() -> dict[str, Any]:
        if not isinstance(network, nn.Module):
            return {}
        return {
            f"{path}.{name}".removeprefix("."): value
            for path, module in network.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        }

    before = settings()
    body(_copies(inputs))
    changed = [name for name, value in settings().items() if before.get(name) != value]
    return f"its attribute {changed[0]}" if changed else "its own attributes"


class Recorded(NamedTuple):
    """What a capture leaves."""

    graphs: tuple[Any, ...]  # torch.cuda.CUDAGraph: own the pool that the recorded work lives in
    inputs: dict[str, Tensor]  # what the work reads, in that pool
    output: Tensor  # what it writes
    nbytes: int  # device memory of the pool
    carried: Any = None  # what else must live as long


@contextmanager
def capture_state(device: torch.device) -> Iterator[None]:
    """How warm-up and capture run, whatever the caller's modes are.

    No autocast cache: weights cast outside would be missing from the graph, and those cast inside
    would be returned, uncomputed, to the next lookup. No inference mode: what is made here
    is written to by later runs that may be outside it.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that captures on `device` are recorded on; nothing else runs there.

    torch's own streams go round, so that another thread may come to hold the same one.
    """
    index = device_index(device)
    stream = _streams.get(index)
    if stream is None:
        if native is None:
            stream = torch.cuda.Stream(index)
        else:
            stream = torch.cuda.ExternalStream(native.cuda_stream(index), device=index)
        _streams[index] = stream
    return stream


def warm_up(
    body: Body, inputs: Inputs, network: Any, device: torch.device, settle: Callable[[], None]
) -> float:
    """Three runs on copies of `inputs`; returns the seconds that the second took.

    The first initialises libraries, compiles and tunes; the second is timed; the third is watched for
    what cannot be captured. ``settle`` is called before and after the third.
    """
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        body(_copies(inputs))
        stream.synchronize()
        start = time.perf_counter()
        body(_copies(inputs))
        stream.synchronize()
        seconds = time.perf_counter() - start
        settle()
        before = device_offset(device)
        with CaptureCheck(device, network):
            body(_copies(inputs))
        if device_offset(device) != before:  # by compiled code, whose operations are not seen
            raise GraphCaptureError(f"the run cannot be captured: {RANDOM}")
        settle()
    torch.cuda.current_stream(device).wait_stream(stream)
    return seconds


def _copies(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in inputs.items()
    }


def record_run(body: Body, inputs: Inputs, device: torch.device) -> Recorded:
    """`body` on new buffers like `inputs`, captured; nothing runs.

    Raises:
        GraphCaptureError: it cannot be captured. The process is as before.
    """
    pool = _fresh_pool(device)
    buffers: dict[str, Tensor] = {}

    def work() -> Tensor:
        buffers.update(_buffers(inputs))
        return body(dict(buffers)).contiguous()

    graph, output = _record_into(pool, device, work)
    torch._C._cuda_clearCublasWorkspaces()
    return Recorded((graph,), buffers, output, pool_bytes(pool))


class StepLoop(NamedTuple):
    """A run that is one step over and over, each with its row of the inputs named in ``per_step``."""

    first: Callable[[Inputs], Any]  # inputs -> what the steps carry along, tensors written in place
    step: Callable[[Inputs, Any, Tensor], None]  # inputs, carried, number of the step (int32 [1])
    output: str  # the input that holds the result after the last step
    per_step: tuple[str, ...]  # inputs [steps, ...]


MAX_STEPS = 64  # of a loop


def record_loop(
    loop: StepLoop, inputs: Inputs, device: torch.device
) -> tuple[Recorded, Tensor, Tensor]:
    """(two graphs, the beginning and one step; the step's number; the number of steps).

    Buffers of ``per_step`` inputs have room for ``MAX_STEPS``.
    """
    pool = _fresh_pool(device)
    buffers: dict[str, Tensor] = {}
    carried: list[Any] = []

    def begin() -> tuple[Tensor, Tensor]:
        buffers.update(_buffers(inputs, loop.per_step))
        carried.append(loop.first(dict(buffers)))
        # Not zeros: the graph would clear them in every run, the number of steps among them, after
        # that was copied in. ``loop_graph`` sets the step's number to 0.
        with _unfilled():
            numbers = torch.empty(2, 1, dtype=torch.int32, device=device)
        return numbers[0], numbers[1]

    first, (number, count) = _record_into(pool, device, begin)
    step, _ = _record_into(pool, device, lambda: loop.step(dict(buffers), carried[0], number))
    torch._C._cuda_clearCublasWorkspaces()
    output = buffers[loop.output]
    recorded = Recorded((first, step), buffers, output, pool_bytes(pool))
    return recorded._replace(carried=(carried, number, count)), number, count


def _buffers(inputs: Inputs, per_step: tuple[str, ...] = ()) -> dict[str, Tensor]:
    with _unfilled():
        return {
            name: t.new_empty((MAX_STEPS, *t.shape[1:]) if name in per_step else t.shape)
            for name, t in inputs.items()
        }


@contextmanager
def _unfilled() -> Iterator[None]:
    """New memory is not written to, also with deterministic algorithms.

    They fill it with NaN, and a graph would do that in every run, after the inputs were copied in.
    """
    setting: Any = torch.utils.deterministic  # its attribute is a property
    filled, setting.fill_uninitialized_memory = setting.fill_uninitialized_memory, False
    try:
        yield
    finally:
        setting.fill_uninitialized_memory = filled


def _fresh_pool(device: torch.device) -> Any:
    """Memory for a capture, and the process made ready for it."""
    torch.cuda.synchronize(device)
    gc.collect()  # or a graph or event may be destroyed during the capture, which breaks it
    torch.cuda.empty_cache()
    # A workspace of this graph alone: two graphs that share one spoil each other's results when
    # they run at the same time.
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.graph_pool_handle()


T = TypeVar("T")


def _record_into(pool: Any, device: torch.device, work: Callable[[], T]) -> tuple[Any, T]:
    """(graph, what `work` returned), its GPU work captured with memory of `pool`."""
    index = device_index(device)
    stream = capture_stream(device)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(stream):
        # thread_local: other threads may go on using the GPU meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = work()
        except BaseException as exc:
            _abandon(graph, pool, index, stream)
            if not isinstance(exc, Exception):
                raise
            raise GraphCaptureError(f"the run cannot be captured: {explain(exc)}") from exc
        try:
            graph.capture_end()
        except RuntimeError as exc:
            _free(pool, index)
            _reset_generators(stream)
            raise GraphCaptureError(f"the run cannot be captured: {explain(exc)}") from exc
    return graph, made


def pool_bytes(pool: Any) -> int:
    """Device memory reserved by an allocator pool."""
    segments = torch.cuda.memory_snapshot(pool, include_traces=False)
    return sum(int(segment["total_size"]) for segment in segments)


def _abandon(graph: Any, pool: Any, index: int, stream: torch.cuda.Stream) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _free(pool, index)
        _reset_generators(stream)


def _free(pool: Any, index: int) -> None:
    """Ends the allocation to the pool of a failed capture: torch 2.11 leaves it open."""
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:
        return  # a torch that closes it itself
    torch._C._cuda_releasePool(index, pool)


def _reset_generators(stream: torch.cuda.Stream) -> None:
    """A capture that ends well takes the random generators out of the capturing state."""
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=stream.device, dtype=torch.float32)
    graph.capture_end()

"""Captured runs on a machine without a GPU: a stand-in of the driver library, and of a capture.

The stand-in (``driver/standin.cpp``) has the driver's functions on host memory; the memory of CPU tensors
stands for a GPU's. A "captured" graph has one node, which calls the body on the captured buffers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlms_engine.engine import cuda_graph, cuda_graph_capture, cuda_graph_check, cuda_graph_run
from dlms_engine.engine.native import native
from dlms_engine.models.denoiser import Denoiser

SOURCE = Path(__file__).parent / "driver" / "standin.cpp"
Kernel = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_void_p))


class KernelNode(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class Standin:
    """The library, and graphs whose nodes are Python functions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self._kept: list[Any] = []

    def graph(self, *functions: Callable[[], object]) -> int:
        """A graph of one node a function, each after the one before."""
        graph, previous = ctypes.c_void_p(), None
        assert self.library.cuGraphCreate(ctypes.byref(graph), 0) == 0
        for function in functions:
            kernel = Kernel(lambda _, function=function: function())
            self._kept.append(kernel)
            node = ctypes.c_void_p()
            parameters = KernelNode(function=ctypes.cast(kernel, ctypes.c_void_p))
            after = None if previous is None else ctypes.byref(previous)
            status = self.library.cuGraphAddKernelNode_v2(
                ctypes.byref(node), graph, after, int(after is not None), ctypes.byref(parameters)
            )
            assert status == 0
            previous = node
        assert graph.value is not None
        return graph.value

    def calls(self, name: str) -> int:
        return int(self.library.standin_calls(name.encode()))

    def fail(self, name: str, status: int) -> None:
        self.library.standin_fail(name.encode(), status)

    def alive(self) -> int:
        """Graphs, plain and instantiated, and events that nobody has destroyed."""
        return int(self.library.standin_alive())

    def unordered(self) -> int:
        """Runs that began before the end of one that was enqueued earlier; of one run at a time."""
        return int(self.library.standin_unordered())

    def depth(self) -> int:
        """Contexts pushed and not popped."""
        return int(self.library.standin_depth())


def build(folder: Path, *flags: str) -> Path:
    """Compiles the stand-in into `folder`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or native is None:
        pytest.skip("needs a C++ compiler and the compiled part")
    path = folder / "libcuda_standin.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-std=c++17",
        "-O1",
        *flags,
        str(SOURCE),
        "-o",
        str(path),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return path


@pytest.fixture(scope="session")
def standin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("standin"))


@contextmanager
def in_place(library: Path) -> Iterator[Standin]:
    """The stand-in, in the place of the driver."""
    native.use_cuda_driver(str(library))
    made = Standin(library)
    yield made
    for name in (
        "cuStreamWaitEvent",
        "cuMemcpyDtoDAsync_v2",
        "cuGraphLaunch",
        "cuEventRecord",
        "cuGraphInstantiateWithFlags",
    ):
        made.fail(name, 0)
    native.use_cuda_driver("")


@pytest.fixture
def driver(standin_library: Path) -> Iterator[Standin]:
    """`in_place`."""
    with in_place(standin_library) as made:
        yield made


class Graph:
    """Stands for a ``torch.cuda.CUDAGraph``."""

    def __init__(self, number: int) -> None:
        self._number = number

    def raw_cuda_graph(self) -> int:
        return self._number


class StandinCapture:
    """Stands for recording: counts what is captured, and replays bodies through the stand-in."""

    def __init__(self, driver: Standin) -> None:
        self.driver = driver
        self.made = self.loops = 0
        self.nbytes = 1 << 20
        self.broken: str | None = None
        self.network: Any = None
        self.replaying = False
        self.watched = False  # by CaptureCheck: with the CPU as the device it sees every read there

    def warm_up(self, body, inputs, network, device, settle) -> float:
        self.network = network
        body({name: t.clone() for name, t in inputs.items()})
        settle()
        check = cuda_graph_check.CaptureCheck(device, network) if self.watched else nullcontext()
        with check:
            body({name: t.clone() for name, t in inputs.items()})
        settle()
        return 2e-3

    def record(self, body, inputs, device) -> cuda_graph_capture.Recorded:
        if self.broken is not None:
            raise cuda_graph.GraphCaptureError(f"the run cannot be captured: {self.broken}")
        self.made += 1
        buffers = {name: torch.full_like(t, -7) for name, t in inputs.items()}
        output = body({name: t.clone() for name, t in inputs.items()}).clone().fill_(-7)

        def replay() -> None:
            self.replaying = True
            with torch.no_grad():
                output.copy_(body({name: t.clone() for name, t in buffers.items()}))
            self.replaying = False

        graph = Graph(self.driver.graph(replay))
        return cuda_graph_capture.Recorded((graph,), buffers, output, self.nbytes)

    def record_loop(self, loop, inputs, device):
        if self.broken is not None:
            raise cuda_graph.GraphCaptureError(f"the run cannot be captured: {self.broken}")
        self.loops += 1
        room = cuda_graph_capture.MAX_STEPS
        buffers = {
            name: t.new_full((room, *t.shape[1:]) if name in loop.per_step else t.shape, -7)
            for name, t in inputs.items()
        }
        number, count = torch.zeros(2, 1, dtype=torch.int32)
        carried: list[Any] = [None]

        def first() -> None:
            with torch.no_grad():
                carried[0] = loop.first(buffers)

        def step() -> None:
            with torch.no_grad():
                loop.step(buffers, carried[0], number)

        graphs = tuple(Graph(self.driver.graph(each)) for each in (first, step))
        output = buffers[loop.output]
        recorded = cuda_graph_capture.Recorded(graphs, buffers, output, self.nbytes)
        return recorded._replace(carried=(carried, number, count)), number, count


@pytest.fixture
def captured(driver: Standin, monkeypatch: pytest.MonkeyPatch) -> StandinCapture:
    """`stand_in`."""
    return stand_in(driver, monkeypatch)


def stand_in(driver: Standin, monkeypatch: pytest.MonkeyPatch) -> StandinCapture:
    """Makes runs on CPU tensors captured runs, by the stand-in driver."""
    capture = StandinCapture(driver)
    monkeypatch.setattr(cuda_graph, "obstacle", lambda device: None)
    monkeypatch.setattr(cuda_graph_capture, "capture_state", lambda device: nullcontext())
    monkeypatch.setattr(cuda_graph_capture, "warm_up", capture.warm_up)
    monkeypatch.setattr(cuda_graph_capture, "record_run", capture.record)
    monkeypatch.setattr(cuda_graph_capture, "record_loop", capture.record_loop)
    # The stand-in has the kernel itself: the library of the loop's kernel.
    monkeypatch.setattr(cuda_graph_run, "loop_library", lambda: str(driver.path))
    monkeypatch.setattr(cuda_graph_run, "device_index", lambda device: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(cuda_graph_run, "_shown", set())
    # As on a GPU, where it does not look: that would make the host wait.
    monkeypatch.setattr(Denoiser, "_refuse_blind", lambda denoiser, alpha: None)
    return capture


def plainly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch.no_grad():
        return function(*arguments)

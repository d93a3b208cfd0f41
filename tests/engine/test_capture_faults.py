"""Captures that go wrong, or that are asked for inside one another: the run goes on plainly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cli_model import TinyNetwork
from standin_driver import Graph, StandinCapture
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlms_engine import Denoiser, Sampler, grids, ops, processes, solvers
from dlms_engine.engine import cuda_graph, cuda_graph_capture, cuda_graph_run, sampler
from dlms_engine.engine.captured_calls import captured_calls
from dlms_engine.engine.cuda_graph import Runnable, StaleGraphError, run_captured
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.cuda_graph_capture import CAPTURING, StepLoop

X = torch.arange(3.0)
EDM = processes.EDM()


def doubled(network: nn.Module, cache: GraphCache) -> Tensor:
    return run_captured(cache, network, (), lambda given: 2 * given["x"], {"x": X})


def test_no_memory_beside_the_graph(captured: StandinCapture, monkeypatch, caplog):
    """The result of its first run did not fit: the plain run, without the graph, may."""

    def full(run: object, inputs: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(cuda_graph_run.CapturedRun, "first", full)
    network, cache = nn.Identity(), GraphCache()
    for _ in range(2):
        assert torch.equal(doubled(network, cache), 2 * X)
    assert captured.made == cache.stats()["failures"] == 1 and len(cache) == 0
    assert "does not fit the GPU's memory" in caplog.text


def test_an_interrupted_capture_can_be_made_again(captured: StandinCapture, monkeypatch):
    """After the capture, before it is kept; whoever came next waited for ever."""
    network, cache, key = nn.Identity(), GraphCache(), Runnable.key

    def interrupted(self: Runnable, tensors: bool | None = None) -> object:
        if captured.made and tensors is None:
            raise KeyboardInterrupt
        return key(self, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Runnable, "key", interrupted)
        with pytest.raises(KeyboardInterrupt):
            doubled(network, cache)
    got: list[Tensor] = []
    later = threading.Thread(target=lambda: got.append(doubled(network, cache)), daemon=True)
    later.start()
    later.join(timeout=20)
    assert got and torch.equal(got[0], 2 * X) and len(cache) == 1


def test_a_run_inside_a_capture_is_part_of_it(monkeypatch):
    """It would wait for the capture that waits for it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu = torch.device("cuda", 0)
    assert cuda_graph.obstacle(gpu) is None
    with CAPTURING:
        reason = cuda_graph.obstacle(gpu)
    assert reason is not None and "another run" in reason
    assert cuda_graph.obstacle(gpu) is None


def test_no_bottleneck_stays_in_a_graphs_memory(captured: StandinCapture, monkeypatch):
    """The next graph's run would overwrite it."""
    monkeypatch.setattr(sampler, "GRAPHS", GraphCache())
    denoiser = Denoiser(TinyNetwork().requires_grad_(False), EDM, "edm", features="mid_block")
    held = Sampler(denoiser, solvers.ddim(EDM, grids.polynomial(EDM, 2)), backend="eager")
    x = torch.randn(2, 3, 8, 8)
    held(x)
    assert denoiser.bottleneck.shape[0] == 2
    with torch.no_grad():
        held._run_graph(x, torch.float32, ops.select("eager"), {})
    with pytest.raises(RuntimeError, match="no bottleneck"):
        _ = denoiser.bottleneck


def test_graphs_are_dropped_when_their_runs_are_over(captured: StandinCapture, monkeypatch):
    """Unmapping their memory (expandable segments) waits for the stream of the captures alone."""
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: order.append("wait"))
    monkeypatch.setattr(GraphCache, "clear", lambda cache: order.append("drop"))
    with captured_calls(Denoiser(nn.Identity(), EDM, "data")):
        assert not order
    assert order == ["wait", "drop"]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Filled(TorchDispatchMode):
    """Whether torch fills the new memory of each operation that asks for some."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "empty" in func.name():
            self.seen.append(torch.utils.deterministic.fill_uninitialized_memory)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_do_not_fill_what_a_graph_reads(monkeypatch):
    """They fill new memory; recorded in a graph, that would follow the copies of the inputs."""
    assert X.new_empty(1000).isnan().all(), "what torch does by itself"

    def recorded(pool: object, device: object, work: Callable[[], Any]) -> tuple[Graph, Any]:
        made = work()
        return Graph(0), made

    monkeypatch.setattr(cuda_graph_capture, "_fresh_pool", lambda device: None)
    monkeypatch.setattr(cuda_graph_capture, "_record_into", recorded)
    monkeypatch.setattr(cuda_graph_capture, "pool_bytes", lambda pool: 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    loop = StepLoop(lambda given: None, lambda given, carried, number: None, "x", ())
    cpu = torch.device("cpu")
    with Filled() as filled:
        cuda_graph_capture.record_run(lambda given: given["x"], {"x": X}, cpu)
        cuda_graph_capture.record_loop(loop, {"x": X}, cpu)
        X.new_empty(1)
    assert filled.seen == [False, False, False, True], "input; input and numbers; anybody's"


@pytest.mark.parametrize("spoilt", [[], [1]], ids=["both", "one alone"])
def test_numbers_that_are_not_finite_are_no_difference_where_the_plain_run_has_them(
    captured: StandinCapture, spoilt: list[int]
):
    """Samples that overflow were told to be those of a graph that is out of date."""
    network, cache = nn.Identity(), GraphCache(verify=1)

    def body(given: Mapping[str, Tensor]) -> Tensor:
        out = given["x"] / torch.tensor([0.0, 1.0, 2.0])
        out[spoilt if captured.replaying else []] = torch.inf
        return out

    x = torch.ones(3)
    run_captured(cache, network, (), body, {"x": x})
    if not spoilt:
        assert run_captured(cache, network, (), body, {"x": x})[0] == torch.inf
        return
    with pytest.raises(StaleGraphError, match="finite"):
        run_captured(cache, network, (), body, {"x": x})

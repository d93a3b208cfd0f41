"""Captures that go wrong, or that are asked for inside one another: the run goes on plainly."""

from __future__ import annotations

import threading

import pytest
import torch
from cli_model import TinyNetwork
from standin_driver import StandinCapture
from torch import Tensor, nn

from dlms_engine import Denoiser, Sampler, grids, ops, processes, solvers
from dlms_engine.engine import cuda_graph, cuda_graph_run, sampler
from dlms_engine.engine.cuda_graph import Runnable, run_captured
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.cuda_graph_capture import CAPTURING

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

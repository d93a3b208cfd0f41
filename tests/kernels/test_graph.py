"""The sampling loop: plain on the CPU, one CUDA graph on a GPU."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from graphed_loop import GraphedLoop
from torch import Tensor, nn

from dlms_engine.engine import cuda_graph
from dlms_engine.engine.cuda_graph import (
    GraphCaptureError,
    StaleGraphError,
    run_captured,
)
from dlms_engine.engine.cuda_graph_cache import GraphCache, graph_key
from dlms_engine.engine.native import native
from dlms_engine.ops import layout, reference

ROWS, DEPTH, SHAPE = 4, 3, (3, 2, 5)


def make_rows(seed: int, batch: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = (ROWS, layout.row_width(DEPTH)) if batch is None else (ROWS, batch, 6 + DEPTH)
    rows = torch.randn(*size, generator=g)
    for n in range(ROWS):
        rows[n, ..., layout.SLOT] = n % DEPTH
        rows[n, ..., layout.B + n + 1 :] = 0.0  # no history before the start
    return rows


def step_network(n: int, network_input: Tensor, inputs) -> Tensor:
    return torch.tanh(network_input * inputs["levels"][n]) + 0.1 * n


def guided_network(n: int, network_input: Tensor, inputs) -> tuple[Tensor, Tensor]:
    f = step_network(n, network_input, inputs)
    return f, f.flip(0)


def expected(x: Tensor, rows: Tensor, levels: Tensor, scale, network=step_network) -> Tensor:
    ring = torch.full((DEPTH, *x.shape), float("nan"))
    network_input = scale * x
    for n in range(ROWS):
        out = network(n, network_input, {"levels": levels})
        f, f_cond = out if isinstance(out, tuple) else (out, None)
        x, m, network_input = reference.fused_row(f, f_cond, x, ring, rows[n])
        reference.write_slot(ring, rows[n], m)
    return x


@pytest.mark.parametrize("network", [step_network, guided_network])
@pytest.mark.parametrize("batch", [None, 3], ids=["shared", "each"])
def test_plain_loop(network, batch):
    x, rows, levels = torch.randn(SHAPE), make_rows(0, batch), torch.rand(ROWS)
    kept = x.clone()
    loop = GraphedLoop(network, None, SHAPE, DEPTH, ROWS, backend="eager")
    got = loop.run(x, rows, first_scale=0.5, inputs={"levels": levels})
    assert torch.equal(got, expected(x, rows, levels, 0.5, network))
    assert torch.equal(x, kept), "x0 must be left alone"


def test_rows_computed_while_running():
    x, rows, levels = torch.randn(SHAPE), make_rows(1, 3), torch.rand(ROWS)
    asked = []

    def row_fn(n, inputs):
        asked.append(n)
        return rows[n] * inputs["gain"]

    loop = GraphedLoop(step_network, row_fn, SHAPE, DEPTH, ROWS, backend="eager")
    got = loop.run(x, inputs={"levels": levels, "gain": torch.ones(())})
    assert asked == list(range(ROWS))
    assert torch.equal(got, expected(x, rows, levels, 1.0))


def test_per_sample_scale_of_the_first_input():
    x, rows, levels = torch.randn(SHAPE), make_rows(2), torch.rand(ROWS)
    scale = torch.rand(3)
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, backend="eager")
    got = loop.run(x, rows, first_scale=scale, inputs={"levels": levels})
    assert torch.equal(got, expected(x, rows, levels, scale.reshape(3, 1, 1)))


def test_always_says_why_it_cannot():
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, mode="always")
    with pytest.raises(GraphCaptureError, match="NVIDIA GPU, these are on cpu"):
        loop.run(torch.randn(SHAPE), make_rows(0), inputs={"levels": torch.rand(ROWS)})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("operation not permitted when stream is capturing", ".item()"),
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture", "CPU memory"),
        ("Offset increment outside graph capture encountered", "random numbers"),
        ("CUDA out of memory. Tried to allocate", "lower the batch size"),
        ("something else\nmore", "RuntimeError: something else"),
    ],
)
def test_reasons(message, reason):
    assert reason in cuda_graph.explain(RuntimeError(message))


def test_the_error_behind_the_error_is_the_reason():
    try:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("capture_end: failed due to a previous error") from None
    except RuntimeError as exc:
        assert ".item()" in cuda_graph.explain(exc)


def test_new_tables_and_inputs_reuse_the_capture(captured):
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, backend="eager")
    for seed in range(3):
        x, rows, levels = torch.randn(SHAPE), make_rows(seed), torch.rand(ROWS)
        got = loop.run(x, rows, inputs={"levels": levels})
        assert torch.equal(got, expected(x, rows, levels, 1.0))
    assert captured.made == 1
    loop.run(x, make_rows(0, 3), inputs={"levels": levels})
    assert captured.made == 2


def test_auto_falls_back_and_tries_once(captured, caplog):
    captured.broken = "host read"
    x, rows, levels = torch.randn(SHAPE), make_rows(0), torch.rand(ROWS)
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, backend="eager")
    for _ in range(3):
        got = loop.run(x, rows, inputs={"levels": levels})
        assert torch.equal(got, expected(x, rows, levels, 1.0))
    assert [r.message for r in caplog.records] == [
        "sampling without a CUDA graph: the run cannot be captured: host read"
    ]
    loop.mode = "always"
    with pytest.raises(GraphCaptureError, match="host read; pass mode='auto'"):
        loop.run(x, rows, inputs={"levels": levels})
    assert loop.cache.stats()["failures"] == 1


class Network(nn.Module):
    """Does something on the side in every call."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.calls = 0
        self.kept = None
        self.shift = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.side == "counts":
            self.calls += 1
        elif self.side == "keeps":
            self.kept = [x + n for n in range(3 + self.training)]
        elif self.side == "caches" and self.kept is None:
            self.kept = torch.ones(1)
        elif self.side == "reads":
            return x * float(self.shift[0].item())
        elif self.side == "masks":
            return x + x[x > 0].sum()
        elif self.side == "draws":
            return x + torch.randn_like(x)
        elif self.side == "indexes":
            return x + self.shift[torch.zeros(1, dtype=torch.long)]
        return x * 2


def through(network: Network, cache: GraphCache, runs: int = 3) -> list[Tensor]:
    body = lambda given: network(given["x"])  # noqa: E731
    return [run_captured(cache, network, (), body, {"x": torch.ones(3)}) for _ in range(runs)]


def test_a_network_that_counts_its_calls_runs_plainly_and_the_counter_is_named(captured, caplog):
    network, cache = Network("counts"), GraphCache()
    assert all(torch.equal(out, torch.full((3,), 2.0)) for out in through(network, cache))
    assert captured.made == 0 and cache.stats()["failures"] == 1
    assert caplog.text.count("its attribute calls in every run") == 1


@pytest.mark.parametrize("side", ["keeps", "caches", "indexes"])
def test_a_network_that_keeps_activations_or_fills_a_cache_is_captured_once(captured, side):
    captured.watched = True
    network, cache = Network(side), GraphCache()
    through(network, cache, 5)
    assert captured.made == 1 and cache.stats()["replays"] == 4


@pytest.mark.parametrize(
    ("side", "operation", "reason"),
    [
        ("reads", "aten._local_scalar_dense", "host wait"),
        ("masks", "aten.index.Tensor", "host wait"),
        ("draws", "aten.randn_like", "random numbers"),
    ],
)
def test_what_cannot_be_captured_is_named_with_its_module(
    captured, caplog, side, operation, reason
):
    captured.watched = True
    outer = nn.Sequential(nn.Identity(), Network(side))
    body = lambda given: outer(given["x"])  # noqa: E731
    for _ in range(2):
        run_captured(GraphCache(), outer, (), body, {"x": torch.ones(3)})
    told = [r.message for r in caplog.records]
    assert captured.made == 0 and len(told) == 1
    assert operation in told[0] and "in 1 (Network)" in told[0] and reason in told[0]


def test_verify_compares_every_nth_run(captured):
    factor = [1.0]
    body = lambda given: given["x"].mul_(factor[0])  # noqa: E731
    cache = GraphCache(verify=2)
    x = torch.ones(3)
    for _ in range(5):
        assert torch.equal(run_captured(cache, body, (), body, {"x": x}), x)
    # A list in a closure is looked into; a graph is made to go stale by force.
    (run,) = {id(r): r for r in [cache.runs.find(_key(body, x))]}.values()
    run._run = native.GraphRun(
        captured.driver.graph(lambda: run._recorded.output.fill_(9)),
        tuple(run._recorded.inputs.values()),
        run._recorded.output,
        0,
    )
    with pytest.raises(StaleGraphError, match="invalidate"):
        for _ in range(2):
            run_captured(cache, body, (), body, {"x": x})


def _key(body, x: Tensor):
    return graph_key(body, {"x": x})[0]


@pytest.mark.parametrize("name", ["cuGraphInstantiateWithFlags", "cuGraphLaunch"])
def test_what_the_driver_refuses_runs_plainly(captured, caplog, name):
    captured.driver.fail(name, 2)
    x, rows, levels = torch.randn(SHAPE), make_rows(0), torch.rand(ROWS)
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, backend="eager")
    for _ in range(2):
        got = loop.run(x, rows, inputs={"levels": levels})
        assert torch.equal(got, expected(x, rows, levels, 1.0))
    assert "out of memory" in caplog.text and loop.cache.stats()["failures"] == 1


def test_an_input_without_elements_runs_plainly(captured):
    x, rows = torch.randn(SHAPE), make_rows(0)
    inputs = {"levels": torch.rand(ROWS), "nothing": torch.zeros(0)}
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, backend="eager")
    got = loop.run(x, rows, inputs=inputs)
    assert torch.equal(got, expected(x, rows, inputs["levels"], 1.0)) and len(loop.cache) == 0


def cuda_run(loop: GraphedLoop, seed: int) -> tuple[Tensor, Tensor]:
    """(graph, plain loop) on fresh inputs."""
    g = torch.Generator().manual_seed(seed)
    x, levels = torch.randn(SHAPE, generator=g).cuda(), torch.rand(ROWS, generator=g).cuda()
    rows = make_rows(seed).cuda()
    plain = GraphedLoop(loop.step_network, None, SHAPE, DEPTH, ROWS, mode="never")
    return (
        loop.run(x, rows, inputs={"levels": levels}),
        plain.run(x, rows, inputs={"levels": levels}),
    )


@pytest.mark.needs_cuda
def test_replay_equals_the_plain_loop_on_new_inputs():
    cache = GraphCache()
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, mode="always", cache=cache)
    for seed in range(5):
        got, want = cuda_run(loop, seed)
        assert torch.equal(got, want), f"seed {seed}"
    assert len(cache) == 1 and cache.nbytes > 0


@pytest.mark.needs_cuda
def test_a_host_read_is_named_and_auto_falls_back(caplog):
    def reads(n, network_input, inputs):
        return network_input * float(inputs["levels"][n].item())

    loop = GraphedLoop(reads, None, SHAPE, DEPTH, ROWS, mode="auto")
    got, want = cuda_run(loop, 0)
    assert torch.equal(got, want) and "sampling without a CUDA graph" in caplog.text
    loop.mode = "always"
    with pytest.raises(GraphCaptureError, match="item"):
        cuda_run(loop, 0)
    assert torch.ones(3, device="cuda").sum().item() == 3, "the device must be usable afterwards"


@pytest.mark.needs_cuda
def test_two_threads_through_one_loop():
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, mode="always")
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(first, first + 40):
                got, want = cuda_run(loop, seed)
                if not torch.equal(got, want):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.needs_cuda
def test_a_copied_loop_captures_again():
    loop = GraphedLoop(step_network, None, SHAPE, DEPTH, ROWS, mode="always")
    cuda_run(loop, 0)
    other = copy.deepcopy(loop)
    assert len(loop.cache) == 1 and len(other.cache) == 0
    got, want = cuda_run(other, 1)
    assert torch.equal(got, want)

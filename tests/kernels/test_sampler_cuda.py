"""A sampler on a GPU: captured, compiled, exported, in two threads; and sizes beyond 2^31."""

from __future__ import annotations

import threading

import pytest
import torch
from package_alone import run_alone
from torch import Tensor, nn

from dlms_engine import grids, ops, processes, solvers
from dlms_engine.engine import sampler
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.export import export_sampler
from dlms_engine.engine.sampler import Sampler, seeded_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.ops import layout
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

pytestmark = pytest.mark.needs_cuda

EDM = processes.EDM()
SHAPE = (3, 8, 8)


class Elementwise(nn.Module):
    """No library kernels, which may choose another algorithm while capturing: the bits must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        hidden = self.mid_block(torch.tanh(self.gain * x))
        shift = c_noise if label is None else c_noise + label
        return hidden * (1 + 0.1 * shift[:, None, None, None]) - 0.3 * x


def designer(process: processes.Process, grid: Tensor) -> DesignerPolicy:
    weights = torch.zeros(4, 3, dtype=torch.float64)
    weights[:, 0] = 1
    made = Designer(DesignerSettings(4, 3, True, "data", features=64), process, grid, weights)
    nn.init.normal_(made.head.weight, std=0.1)
    return DesignerPolicy(made)


POLICIES = {
    "table": lambda p, g: solvers.ipndm(p, g, order=3, afs=True),
    "dlms": designer,
    "amed": lambda p, g: AmedPolicy(AmedPredictor(64), AmedBase("amed"), p, g[::2].clone()),
}
PROCESSES = [EDM, processes.VPDiscrete(betas=torch.linspace(1e-4, 0.02, 100))]


def make(policy: str, process: processes.Process = EDM, **options) -> Sampler:
    torch.manual_seed(0)
    held = POLICIES[policy](process, grids.logsnr(process, 4))
    denoiser = Denoiser(Elementwise(), process, "noise", features="mid_block", **options)
    return Sampler(denoiser.requires_grad_(False), held).cuda()


def plainly(held: Sampler, x: Tensor, **cond: Tensor) -> Tensor:
    """The plain loop on the same kernels: one that is watched is not captured."""
    sample: Tensor = held(x, callback=lambda step: None, **cond)
    return sample


def noise(first: int, batch: int = 3) -> Tensor:
    return seeded_noise(range(first, first + batch), SHAPE, 8.0, device="cuda")


@pytest.fixture
def cache(monkeypatch) -> GraphCache:
    fresh = GraphCache()
    monkeypatch.setattr(sampler, "GRAPHS", fresh)
    return fresh


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_captured_and_has_the_plain_loops_bits(cache, policy, process, caplog):
    held = make(policy, process)
    for first in (0, 10):
        assert torch.equal(held(noise(first)), plainly(held, noise(first)))
    assert (
        not [r for r in caplog.records if r.name == "dlms_engine"]
        and len(cache) == 1
        and cache.nbytes > 0
    )


def test_an_empty_batch_is_not_captured(cache):
    assert make("table")(noise(0, 0)).shape == (0, *SHAPE) and len(cache) == 0


def test_guided_runs_are_captured(cache, caplog):
    held = make("table", guidance_scale=2.0, unconditional={"label": torch.zeros(1)})
    for value in (1.0, 2.0):
        label = torch.full((3,), value, device="cuda")
        assert torch.equal(held(noise(0), label=label), plainly(held, noise(0), label=label))
    assert not [r for r in caplog.records if r.name == "dlms_engine"] and len(cache) == 1


def test_evicted_graphs_give_their_memory_back(cache):
    cache.max_entries = 1
    held = make("table")
    reserved = []
    for _ in range(3):
        for batch in (64, 256):
            held(noise(0, batch))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert len(cache) == 1 and reserved[2] <= reserved[0]


@pytest.mark.parametrize("policy", ["table", "dlms"])
def test_two_threads_through_one_sampler(cache, policy):
    held, wrong = make(policy), []
    expected = {first: plainly(held, noise(first)) for first in range(40)}

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for first in range(start, 40, 2):
                if not torch.equal(held(noise(first)), expected[first]):
                    wrong.append(first)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("policy", ["table", "dlms"])
def test_compiled_whole(policy):
    """Inductor has its own tanh and contracts products: close, not equal."""
    torch._dynamo.reset()
    held = make(policy)
    got = torch.compile(held, fullgraph=True)(noise(0))
    torch.testing.assert_close(got, plainly(held, noise(0)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_exported_package(tmp_path):
    held = make("dlms")
    path = export_sampler(held, noise(0), tmp_path / "sampler.pt2", max_batch=64)
    outputs, _ = run_alone(path.parent, [(noise(0, batch),) for batch in (1, 3, 7)])
    for got, batch in zip(outputs, (1, 3, 7), strict=True):
        torch.testing.assert_close(got, plainly(held, noise(0, batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_than_two_to_the_31_elements(name):
    """The last elements of the last slot: offsets beyond 2^32."""
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GiB of GPU memory")
    total, depth = 2**31 + 8, 2
    row = torch.tensor([0.5, 0.25, 1.0, 2.0, 1.0, 1.0, 4.0, 8.0], device="cuda")
    assert row.numel() == layout.row_width(depth)
    x = torch.ones(1, total, device="cuda")
    f = torch.full((1, total), 2.0, dtype=torch.float16, device="cuda")
    ring = torch.full((depth, 1, total), 3.0, device="cuda")
    network_input = torch.zeros_like(f)
    ops.select(name, "cuda").fused_row_(f, None, x, ring, row, network_input)
    for where in (slice(0, 8), slice(2**31 - 8, None)):
        assert ring[1, 0, where].eq(1.0).all()  # m = 0.5 * 1 + 0.25 * 2
        assert ring[0, 0, where].eq(3.0).all()
        assert x[0, where].eq(29.0).all()  # 1 + 4 * 1 + 8 * 3
        assert network_input[0, where].eq(58.0).all()

"""A run copies nothing from or to the host and reads no number there, or no CUDA graph takes it.

The loop runs on the `meta` device, which has no values: reading one raises by itself, and a copy
from the CPU is seen by a dispatch mode.
"""

from __future__ import annotations

import pytest
import torch
from cli_model import TinyNetwork
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlms_engine import grids, ops, processes, solvers
from dlms_engine.engine import cuda_graph_capture
from dlms_engine.engine.sampler import Sampler
from dlms_engine.engine.steps import run_plain
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings


class HostCopy(RuntimeError):
    """What a capture would refuse."""


class NoHostCopies(TorchDispatchMode):
    """Raises where a tensor crosses between the CPU and the device.

    A CPU scalar in arithmetic is an argument of the kernel, as a Python number is: no copy.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in (*given, *tree_leaves(out)) if isinstance(t, Tensor)}
        scalars = all(t.ndim == 0 for t in given if t.device.type == "cpu")
        if kinds == {"cpu", "meta"} and not (scalars and "copy" not in str(func)):
            raise HostCopy(str(func))
        return out


PROCESSES = [
    processes.EDM(),
    processes.VP(),
    processes.Cosine(),
    processes.VPDiscrete(betas=torch.linspace(1e-4, 0.02, 100)),
]


def designer(process: processes.Process, grid: Tensor, prediction: str) -> DesignerPolicy:
    weights = torch.zeros(4, 3, dtype=torch.float64)
    weights[:, 0] = 1
    settings = DesignerSettings(4, 3, True, prediction, features=64)
    return DesignerPolicy(Designer(settings, process, grid, weights))


POLICIES = {
    "table": lambda p, g: solvers.ipndm(p, g, order=3, afs=True),
    "dlms": lambda p, g: designer(p, g, "data"),
    "dlms noise": lambda p, g: designer(p, g, "noise"),
    "amed": lambda p, g: AmedPolicy(AmedPredictor(64), AmedBase("amed", afs=True), p, g[::2]),
    "amed plugin": lambda p, g: AmedPolicy(AmedPredictor(64), AmedBase("ipndm"), p, g[::2]),
}


def check(sampler: Sampler, **cond: Tensor) -> None:
    """Two runs, the second as a capture would see it: what is copied once has been copied."""
    sampler.denoiser.to("meta")
    x = torch.empty(3, 3, 8, 8, device="meta")

    def run() -> Tensor:
        steps = sampler._steps(x.clone(), cond)
        return run_plain(steps, x.clone(), torch.float32, ops.select("eager"), None)

    run()
    with NoHostCopies():
        assert run().shape == x.shape


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_every_policy(process, policy):
    grid = grids.logsnr(process, 4)
    denoiser = Denoiser(TinyNetwork(), process, "noise", features="mid_block")
    check(Sampler(denoiser, POLICIES[policy](process, grid)))


class Labelled(TinyNetwork):
    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, c_noise) + label[:, None, None, None]


@torch.no_grad()
def test_guidance_with_an_unconditional_branch_on_the_cpu():
    """Bug: the unconditional tensors were copied to the device in every evaluation."""
    process = PROCESSES[0]
    denoiser = Denoiser(
        Labelled(), process, "edm", guidance_scale=2.0, unconditional={"label": torch.zeros(1)}
    )
    table = solvers.ddim(process, grids.polynomial(process, 3))
    check(Sampler(denoiser, table), label=torch.ones(3, device="meta"))


class Copies(TinyNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(3, 1, 1)  # no buffer: it stays on the CPU

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return super().forward(x, c_noise) + self.shift.to(x.device)


class Reads(nn.Module):
    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return x if float(c_noise.max()) > 0 else -x


@pytest.mark.parametrize(("network", "error"), [(Copies, HostCopy), (Reads, RuntimeError)])
@torch.no_grad()
def test_the_check_can_fail(network, error):
    process = PROCESSES[0]
    table = solvers.ddim(process, grids.polynomial(process, 3))
    with pytest.raises(error):
        check(Sampler(Denoiser(network(), process, "edm"), table))


class Written(TorchDispatchMode):
    """Operations that write memory, which a capture would repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_loops_beginning_leaves_the_number_of_steps_alone(monkeypatch):
    """Bug: it was made by torch.zeros, so that the graph cleared what had been copied in."""
    seen = Written()

    def record_into(pool, device, work):
        with seen:
            return None, work()

    monkeypatch.setattr(cuda_graph_capture, "_fresh_pool", lambda device: None)
    monkeypatch.setattr(cuda_graph_capture, "_record_into", record_into)
    monkeypatch.setattr(cuda_graph_capture, "pool_bytes", lambda pool: 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    loop = cuda_graph_capture.StepLoop(
        lambda given: None, lambda given, carried, number: None, "x", ("rows",)
    )
    inputs = {"x": torch.zeros(2), "rows": torch.zeros(4, 3)}
    recorded, number, count = cuda_graph_capture.record_loop(loop, inputs, torch.device("cpu"))
    assert number.shape == count.shape == (1,) and number.dtype == count.dtype == torch.int32
    assert recorded.inputs["rows"].shape == (cuda_graph_capture.MAX_STEPS, 3)
    assert seen.names == []
    with seen:  # a planted fault
        torch.zeros(2)
    assert seen.names != []

"""Where the designer's kernel is used, and what a run with it consists of."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from designer_cases import DISCRETE, EDM, Given, both, check, make_denoiser, make_policy, sampler
from gpu import triton_device
from test_capturable import NoHostCopies
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlms_engine.engine.dlms_steps import DesignerSteps, policy_steps, takes
from dlms_engine.engine.sampler import seeded_noise
from dlms_engine.engine.steps import PolicySteps
from dlms_engine.ops import designer_row
from dlms_engine.policies.dlms import Design, DesignerPolicy


@pytest.fixture
def device() -> str:
    return triton_device()


class Louder(DesignerPolicy):
    def design(self, features: Tensor | None, t: Tensor, n: int) -> Design:
        return super().design(features, t, n)._replace(network_time=t)


def test_what_the_kernel_does_not_take():
    policy = make_policy()
    policy.designer.requires_grad_(True)
    assert not takes(policy)
    with torch.no_grad():
        assert takes(policy)
        assert not takes(Louder(policy.designer))
        policy.designer.index.half()
        assert not takes(policy)


def test_torch_operations_wherever_nobody_asked_for_a_gpus_kernels():
    for backend in ("eager", "cpu"):
        assert designer_row.select_designer(backend, torch.device("cpu")) is None
    x, policy = torch.zeros(2, 1), make_policy()
    assert isinstance(sampler("cpu", "auto", policy)._steps(x, {}), PolicySteps)
    assert designer_row.select_designer("triton", torch.device("meta")) is None


class Preconditioned(Given):
    def preconditioning(self, t: Tensor, prediction: Literal["data", "noise"] = "data"):
        return super().preconditioning(t, prediction)


class Levelled(Given):
    def _noise_level(self, t: Tensor) -> Tensor:
        return super()._noise_level(2 * t)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Preconditioned, Levelled])
def test_torch_operations_for_a_denoiser_with_coefficients_of_its_own(device, kind):
    x, policy = torch.zeros(2, 1, device=device), make_policy()
    usual = make_denoiser(EDM, "edm")
    for own, steps in ((Given, DesignerSteps), (kind, PolicySteps)):
        usual.__class__ = own
        made = policy_steps(usual.to(device), policy, x, torch.float32, {}, "triton")
        assert type(made) is steps


@torch.no_grad()
def test_a_triton_that_does_not_build(monkeypatch, caplog):
    """The CUDA kernels go on with torch operations; whoever asked for Triton is told."""

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    broken = designer_row.Kernels(fails, fails, ("cpu",))
    policy, denoiser, x = make_policy(), make_denoiser(EDM, "edm"), torch.zeros(2, 1)
    monkeypatch.setattr(designer_row, "_held", [broken])
    with pytest.raises(RuntimeError, match="C compiler"):
        policy_steps(denoiser, policy, x, torch.float32, {}, "triton")
    for _ in range(2):
        steps = policy_steps(denoiser, policy, x, torch.float32, {}, "cuda")
        assert isinstance(steps, PolicySteps)
    assert [r.message for r in caplog.records if "C compiler" in r.message] != []
    assert len(caplog.records) == 1


@torch.no_grad()
def test_nothing_is_copied_from_the_host(device):
    """Two runs, the second as a capture would see it (`test_capturable`)."""
    from dlms_engine.kernels.triton import designer

    policy = make_policy(DISCRETE)
    held = sampler("meta", "auto", policy)
    policy.place(torch.device("meta"))
    x = torch.empty(3, 3, 8, 8, device="meta")

    def go() -> None:
        steps = DesignerSteps(held.denoiser, policy, designer.KERNELS, x, torch.float32, {})
        for n in range(steps.count):
            steps.evaluate(n, x.to(torch.float64))
            assert steps.row(n).shape == (3, 9)

    go()
    with NoHostCopies():
        go()


class Count(TorchDispatchMode):
    """Operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_operations_of_a_row(device):
    """One beside the bottleneck's mean, and three before the first row."""
    held = sampler(device, "triton", make_policy(), torch.float32)
    x = torch.zeros(3, 3, 8, 8, device=device)
    with Count() as before:
        steps = held._steps(x, {})
    assert len(before.names) == 3, before.names
    for n in range(steps.count):
        steps.evaluate(n, x)
        with Count() as row:
            steps.row(n)
        assert len(row.names) == 2, row.names


def test_opcheck(device):
    policy = make_policy()
    held = sampler(device, "triton", policy, torch.float32)
    with torch.no_grad():
        steps = held._steps(torch.zeros(2, 3, 8, 8, device=device), {})
    from dlms_engine.kernels.triton import designer

    parameters, config = [t.detach() for t in steps._parameters], list(steps._config)
    dtypes = (torch.float32, torch.float32)
    torch.library.opcheck(designer.designer_start, (parameters, config, 2, *dtypes))
    features = torch.zeros(2, 64, device=device)
    given = (features, steps._state, parameters, config, 0, *dtypes)
    torch.library.opcheck(designer.designer_row, given)
    with pytest.raises(ValueError, match="bottleneck of 64"):
        designer.designer_row(features[:, :5], *given[1:])


@pytest.mark.slow
def test_a_compiled_sampler_calls_the_kernel_and_an_exported_one_does_not(device):
    """Bug: torch 2.11 says in torch.compile that it exports, so the kernel was never taken there."""
    torch._dynamo.reset()
    held = sampler(device, "triton", make_policy(), torch.float32)
    noise = seeded_noise(range(2), (3, 8, 8), 80.0, device=device)
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, example):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(held, fullgraph=True, backend=backend)(noise)
    rows = [name for name in called if "dlms_triton.designer_row" in name]
    assert len(rows) == held.nfe, called
    program = torch.export.export(Exportable(held), (noise,))
    assert "designer_row" not in str(program.graph)


class Exportable(nn.Module):
    """Steps of a sampler, as a module that torch.export takes."""

    def __init__(self, held) -> None:
        super().__init__()
        self.network, self.designer = held.denoiser, held.policy.designer
        self.held = [held]

    def forward(self, noise):
        steps = self.held[0]._steps(noise, {})
        steps.evaluate(0, noise)
        return steps.row(0)


def test_inside_torch_compile(device):
    """One graph; Inductor only where the kernels are Triton's own."""
    torch._dynamo.reset()
    held = sampler(device, "triton", make_policy(), torch.float32)
    noise = seeded_noise(range(2), (3, 8, 8), 80.0, device=device)
    backend = "aot_eager" if device == "cpu" else "inductor"
    got = torch.compile(held, fullgraph=True, backend=backend)(noise)
    torch.testing.assert_close(got, held(noise), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parameters_changed_in_place_are_seen(device):
    policy, denoiser = make_policy(), make_denoiser(EDM, "edm")
    before = both(device, policy, denoiser)[1]
    nn.init.zeros_(policy.designer.head.weight)
    check(device, policy, denoiser)
    assert not torch.equal(before[1][0], both(device, policy, denoiser)[1][1][0])

"""What a run does besides the network and its rows: each operation is a node of the captured graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlms_engine import grids, ops, solvers
from dlms_engine.engine import sampler as sampler_module
from dlms_engine.engine import steps
from dlms_engine.engine.sampler import Sampler
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

NO_KERNEL = ("empty", "new_empty", "empty_like")


class Operations(TorchDispatchMode):
    """Names of the operations that launch something: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name.split("::")[1] not in NO_KERNEL:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Silent(nn.Module):
    """A network of no operations."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.levels: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor, **cond: Tensor) -> Tensor:
        self.levels.append(c_noise)
        return x


@pytest.fixture
def row() -> ops.Backend:
    """A fused row that counts as one operation (of any kind)."""
    return replace(ops.select("eager"), fused_row_=lambda f, f_cond, x, *rest: x.neg_())


def operations(
    dtype: torch.dtype, row: ops.Backend, cond: dict[str, Tensor] | None = None, **options
) -> tuple[list[str], Silent]:
    network = Silent(dtype)
    table = solvers.ipndm(EDM(), grids.polynomial(EDM(), 5), order=3)
    held = Sampler(Denoiser(network, EDM(), "edm", **options), table)
    x = torch.zeros(2, 3, 4, 4)
    taken = held._steps(x, cond or {})
    with torch.no_grad(), Operations() as found:
        steps.run_plain(taken, x, held._network_dtype(x), row, None)
    assert len(network.levels) == 5
    # each evaluation's copy of the noise level is the CPU's alone: models.tap.called
    assert found.names.count("aten::clone") == 5
    return [name for name in found.names if name != "aten::clone"], network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_five_evaluations_are_six_operations(dtype, row):
    """The first network input and a row an evaluation."""
    names, network = operations(dtype, row)
    assert len(names) == 6, names
    assert {level.dtype for level in network.levels} == {torch.float32}


def test_a_cast_in_the_run_would_be_counted(row, monkeypatch):
    """Bug: noise levels lay in the plan in float64, one cast an evaluation."""
    made = steps.plan_table

    def plan_table(*args):
        plan = made(*args)
        return plan._replace(c_noise=plan.c_noise.double(), c_in=plan.c_in.double())

    monkeypatch.setattr(sampler_module, "plan_table", plan_table)
    names, _ = operations(torch.float32, row)
    assert len(names) == 12 and names.count("aten::_to_copy") == 6, names


def test_guidance_joins_the_network_input_and_its_conditions_alone(row):
    """Two joins an evaluation beside the row: the noise level is not joined."""
    label = {"y": torch.zeros(1)}
    names, _ = operations(torch.float32, row, label, guidance_scale=2.0, unconditional=label)
    assert names.count("aten::cat") == 10 and len(names) == 16, names


def test_levels_stay_float64_for_a_float64_network(row):
    _, network = operations(torch.float64, row)
    assert {level.dtype for level in network.levels} == {torch.float64}


def test_a_network_that_changes_its_dtype_gets_its_levels_anew():
    network = Silent(torch.float32)
    table = solvers.ipndm(EDM(), grids.polynomial(EDM(), 5), order=3)
    held = Sampler(Denoiser(network, EDM(), "edm"), table, backend="eager")
    x = torch.zeros(1, 3, 4, 4)
    held(x)
    network.double()
    held(x)
    early, late = network.levels[:5], network.levels[5:]
    assert {level.dtype for level in early} == {torch.float32}
    fresh = Sampler(Denoiser(network, EDM(), "edm"), table, backend="eager")
    fresh(x)
    assert all(torch.equal(a, b) for a, b in zip(late, network.levels[10:], strict=True))
    assert any(float(a[0]) != float(b[0]) for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_first_input_has_the_bits_of_a_product_and_a_cast(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 64, 64, generator=generator)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01
    with torch.no_grad():
        got = steps.first_input(x, scale, dtype)
    factor = scale.float().reshape(-1, 1, 1, 1) if shape else scale.float()
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, (factor * x).to(dtype))

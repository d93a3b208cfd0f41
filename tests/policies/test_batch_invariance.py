"""Rows that are computed per sample have the same bits in any batch, on a network that has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlms_engine import Sampler, grids, ops, processes
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.ops import linear
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

SHAPE = (4, 4, 4)
PROCESSES = {"edm": processes.EDM(), "vp": processes.VP(), "flow": processes.RectifiedFlow()}


class Elementwise(nn.Module):
    """Every output number depends on its own input number and the time; a tap of 4 channels."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=dtype), requires_grad=False)
        self.tap = nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.tap(x / (1 + x.abs()))
        return (x * self.scale / (1 + t.reshape(-1, 1, 1, 1).abs())).to(x.dtype)


def stirred(module: nn.Module) -> nn.Module:
    """With weights that move every number: an untrained designer says the same of all samples."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.3 * noise.to(parameter.dtype))
    return module


def dlms(process: processes.Process) -> DesignerPolicy:
    settings = DesignerSettings(4, 3, afs=True, features=16, coordinate="linear")
    grid = grids.time_uniform(process, 4)
    weights = torch.zeros(4, 3, dtype=torch.float64)
    weights[:, 0] = 1
    return DesignerPolicy(stirred(Designer(settings, process, grid, weights)))


def amed(process: processes.Process) -> AmedPolicy:
    base = AmedBase("ipndm" if isinstance(process, processes.RectifiedFlow) else "dpm_solver_pp")
    grid = grids.time_uniform(process, 3)
    return AmedPolicy(stirred(AmedPredictor(16, 0.1, 0.1)), base, process, grid)


def differing(sampler: Sampler, count: int = 64) -> int:
    """Samples whose bits depend on their company: alone, in 3 and in 64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *SHAPE, generator=generator)
    x = x * float(sampler.policy.process.sigma(torch.tensor(sampler.policy.t_start)))
    together = sampler(x)
    alone = torch.cat([sampler(x[i : i + 1]) for i in range(count)])
    threes = torch.cat([sampler(x[i : i + 3]) for i in range(0, count, 3)])
    assert bool(together.isfinite().all())
    return sum(
        not (torch.equal(together[i], alone[i]) and torch.equal(together[i], threes[i]))
        for i in range(count)
    )


def sampler_of(
    make: Callable[[processes.Process], DesignerPolicy | AmedPolicy],
    process: processes.Process,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Sampler:
    prediction = "flow" if isinstance(process, processes.RectifiedFlow) else "data"
    denoiser = Denoiser(Elementwise(dtype), process, prediction, features="tap")
    return Sampler(denoiser, make(process), backend=backend)


@pytest.mark.parametrize("backend", [b for b in ("cpu", "eager") if b in ops.available()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("make", [dlms, amed])
def test_samples_do_not_depend_on_their_batch(make, process, dtype, backend) -> None:
    """64 of 64 samples of DLMS and 33 of 64 of AMED differed."""
    assert differing(sampler_of(make, PROCESSES[process], dtype, backend)) == 0


@pytest.mark.parametrize("make", [dlms, amed])
def test_layers_of_blas_would_differ(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: sums that are taken as the batch suggests."""

    def by_batch(layer: nn.Linear, x: Tensor) -> Tensor:
        products = x[:, :, None] * layer.weight.t()
        halves = products[:, ::2].sum(1) + products[:, 1::2].sum(1)
        sums = products.sum(1) if len(x) > 1 else halves
        return sums if layer.bias is None else sums + layer.bias

    monkeypatch.setattr(linear, "linear", by_batch)
    assert differing(sampler_of(make, PROCESSES["edm"], torch.float32)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inputs", [1, 5, 20, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_is_its_meaning_bit_for_bit(dtype, inputs, bias) -> None:
    generator = torch.Generator().manual_seed(inputs)
    layer = nn.Linear(inputs, 7, bias=bias, dtype=dtype).requires_grad_(False)
    wide = torch.randn(2 * inputs, 9, generator=generator, dtype=dtype)
    for x in (wide.t()[:, :inputs].contiguous(), wide[::2].t()):
        with torch.no_grad():
            got = linear.linear(layer, x)
        assert torch.equal(got, linear.linear_rows(x, layer.weight, layer.bias))
        exact = x.double() @ layer.weight.double().t()
        exact = exact if layer.bias is None else exact + layer.bias.double()
        # every product and sum is rounded once: at most log2(inputs) + 2 roundings a number
        size = x.double().abs() @ layer.weight.double().abs().t() + 1
        bound = (inputs.bit_length() + 2) * torch.finfo(dtype).eps * size
        assert bool(((got.double() - exact).abs() <= bound).all())
        torch.library.opcheck(torch.ops.dlms.linear_rows.default, (x, layer.weight, layer.bias))


def test_gradients_go_through_the_usual_layers() -> None:
    layer = nn.Linear(5, 2)
    x = torch.randn(3, 5)
    assert torch.equal(linear.linear(layer, x), layer(x))
    assert linear.linear(layer, x).requires_grad

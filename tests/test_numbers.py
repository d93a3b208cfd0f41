"""Numbers that mean nothing are refused by their value; unusual numbers that mean something are right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlms_engine import Sampler, distill, grids, processes, solvers
from dlms_engine.engine.sampler import seeded_noise
from dlms_engine.models.denoiser import Denoiser

NAN, INF = math.nan, math.inf
EDM, VP, FLOW = processes.EDM(), processes.VP(), processes.RectifiedFlow()
GRID = grids.polynomial(EDM, 4)


def plain(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + t.reshape(-1, *[1] * (x.ndim - 1)))


def denoiser(**options: Any) -> Denoiser:
    return Denoiser(plain, EDM, "data", **options)


GUIDED: dict[str, Any] = {"unconditional": {"y": torch.zeros(1)}}
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "edm nan": (lambda: processes.EDM(NAN), "t_min is nan"),
    "vp inf": (lambda: processes.VP(INF), "beta_d is inf"),
    "vp beta_min": (lambda: processes.VP(beta_min=INF), "beta_min is inf"),
    "cosine inf": (lambda: processes.Cosine(INF), "s is inf"),
    "fitted negative": (lambda: processes.VP.fitted(-1, 80), "sigma_min is -1"),
    "fitted unsorted": (lambda: processes.VP.fitted(80, 1), "sigma_min is 80, sigma_max is 1"),
    "betas nan": (lambda: processes.VPDiscrete(betas=[NAN, 0.1]), "inside"),
    "unsorted levels": (lambda: processes.VPDiscrete(alphas_cumprod=[0.5, 0.9]), "falling"),
    "time": (lambda: VP.alpha(-1), "is -1"),
    "time nan": (lambda: VP.sigma(NAN), "is nan"),
    "level": (lambda: VP.inverse_sigma([0.5, -2.0]), "-2.0"),
    "steps": (lambda: grids.polynomial(EDM, 2.5), "steps is 2.5"),
    "steps 0": (lambda: grids.polynomial(EDM, np.int64(0)), "steps is np.int64"),
    "rho": (lambda: grids.polynomial(EDM, 3, "7"), "rho is '7'"),
    "t_max": (lambda: grids.logsnr(VP, 3, t_max=NAN), "t_max is nan"),
    "beyond": (lambda: grids.time_uniform(FLOW, 3, t_max=2.0), "t_max is 2.0, beyond"),
    "unsorted": (lambda: grids.from_times(VP, [0.1, 0.5, 1.0]), "strictly decreasing"),
    "negative": (lambda: grids.from_times(VP, [1.0, 0.5, -0.5]), "-0.5"),
    "nan times": (lambda: grids.from_times(VP, [1.0, NAN]), "nan"),
    "shift": (lambda: grids.shifted(FLOW, 3, 0), "shift is 0"),
    "shift -1": (lambda: grids.shifted(FLOW, 3, -1), "shift is -1"),
    "shift text": (lambda: grids.shifted(FLOW, 3, "3"), "shift is '3'"),
    "order": (lambda: solvers.deis(EDM, GRID, order=2.5), "order is 2.5"),
    "seed": (lambda: seeded_noise([-1], (2,)), "seed is -1"),
    "seed 2^64": (lambda: seeded_noise([1 << 64], (2,)), "seed is 18446744073709551616"),
    "seed 1.5": (lambda: seeded_noise([1.5], (2,)), "seed is 1.5"),
    "seed inf": (lambda: seeded_noise([INF], (2,)), "seed is inf"),
    "distill seed": (lambda: distill(denoiser(), "gits", shape=(2,), seed=1 << 64), "seed is"),
    "distill seed 1.5": (lambda: distill(denoiser(), "gits", shape=(2,), seed=1.5), "seed is 1.5"),
    "distill nfe": (lambda: distill(denoiser(), "gits", shape=(2,), nfe="3"), "nfe is '3'"),
    "distill nfe 0": (lambda: distill(denoiser(), "gits", shape=(2,), nfe=0), "nfe is 0"),
    "distill shape": (lambda: distill(denoiser(), "gits", shape=(2.5,)), "a size in shape is 2.5"),
    "shape": (lambda: seeded_noise([0], (3, -1)), "a size in shape is -1"),
    "scale": (lambda: seeded_noise([0], (2,), NAN), "scale is nan"),
    "scale -1": (lambda: seeded_noise([0], (2,), -1), "scale is -1"),
    "sigma_data": (lambda: denoiser(sigma_data=NAN), "sigma_data is nan"),
    "sigma_data 0": (lambda: denoiser(sigma_data=0), "sigma_data is 0"),
    "guidance": (lambda: denoiser(guidance_scale=NAN, **GUIDED), "guidance_scale is nan"),
    "guidance text": (lambda: denoiser(guidance_scale="3", **GUIDED), "guidance_scale is '3'"),
    "time_scale": (lambda: denoiser(time_input="t", time_scale=0), "time_scale is 0"),
    "thresholding": (lambda: denoiser(dynamic_thresholding=NAN), "dynamic_thresholding is nan"),
    "predict": (lambda: denoiser().predict(torch.ones(1, 2), -1), "is -1"),
    "predict nan": (lambda: denoiser().predict(torch.ones(1, 2), NAN), "is nan"),
    "complex": (lambda: sampler()(torch.ones(1, 2, dtype=torch.complex64)), "complex64"),
    "bool": (lambda: sampler()(torch.ones(1, 2, dtype=torch.bool)), "torch.bool"),
}  # fmt: skip


def sampler(steps: int = 4) -> Sampler:
    return Sampler(denoiser(), solvers.ipndm(EDM, grids.polynomial(EDM, steps)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_value(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call()


def test_noise_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="noise is ndarray"):
        sampler()(np.ones((1, 2)))


def test_numpy_numbers_and_arrays_are_taken() -> None:
    """A seed of numpy's overflowed in a distillation."""
    one, two = (
        distill(
            denoiser(),
            "dode",
            nfe=kind(2),
            shape=(kind(2),),
            seed=kind(3),
            scale=2,
            trajectories=4,
            progress=False,
        ).policy
        for kind in (int, np.int64)
    )
    assert torch.equal(one.b, two.b)
    assert torch.equal(grids.polynomial(EDM, np.int64(4), np.float64(7)), GRID)
    assert solvers.ipndm(EDM, GRID, order=np.int32(2)).depth == 2
    rising = np.array([0.1, 0.5, 1.0])
    assert grids.from_times(VP, rising[::-1]).tolist() == [1.0, 0.5, 0.1]  # a negative stride
    levels = np.linspace(0.01, 0.99, 10)[::-1]
    process = processes.VPDiscrete(alphas_cumprod=levels)
    assert process == processes.VPDiscrete(alphas_cumprod=levels.tolist())
    whole = seeded_noise([3, (1 << 64) - 1], (2,))
    again = seeded_noise([np.int64(3), np.uint64((1 << 64) - 1)], (np.int64(2),))
    assert torch.equal(whole, again)
    assert torch.equal(seeded_noise(torch.tensor([3]), (2,)), whole[:1])


def test_any_strides_of_the_noise_give_the_same_samples() -> None:
    x = 80 * torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    want = sampler()(x)
    for same in (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), x.double(), x.flip(0).flip(0)):
        assert torch.equal(sampler()(same), want)
    assert torch.equal(sampler()(x[::2]), want[::2])


@pytest.mark.parametrize("maker", [solvers.ipndm, solvers.deis])
def test_histories_of_more_than_64_outputs(maker: Callable[..., Any]) -> None:
    """On a flow they combine all outputs so far: from 66 steps on the compiled loop refused."""
    table = maker(FLOW, grids.time_uniform(FLOW, 66))
    assert table.depth == 65
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    network = Denoiser(lambda x, _t: -0.5 * x, FLOW, "flow")
    got, eager = Sampler(network, table)(x), Sampler(network, table, backend="eager")(x)
    assert torch.equal(got, eager)
    exact = x * math.exp(0.5)  # dx/dt = -x/2 from t = 1 to 0
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=0)


class Small(nn.Module):
    """Three weights in float32 on the CPU, whatever the defaults are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float32, device="cpu"))
        self.mid = nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.mid(x.reshape(len(x), 3, 1, 1) * self.weight.reshape(3, 1, 1))
        return x * self.weight / (1 + t.reshape(-1, 1))


LEARNED: dict[str, dict[str, Any]] = {
    "dlms": {"trajectories": 16, "batch": 8},
    "amed": {"trajectories": 16, "batch": 8},
    "gits": {"trajectories": 8},
    "free_table": {"trajectories": 16, "batch": 8},
}


def learned(method: str) -> Tensor:
    held = Denoiser(Small(), EDM, "data", features="mid")
    shape, options = (3,), LEARNED[method]
    solver = distill(held, method, nfe=4, shape=shape, progress=False, **options)
    out: Tensor = Sampler(held, solver).sample([0, 1], shape)
    return out


@pytest.mark.parametrize("method", LEARNED)
def test_distillation_where_gradients_are_switched_off(method: str) -> None:
    """It died in its first update: element 0 of tensors does not require grad."""
    want = learned(method)
    with torch.no_grad():
        assert torch.equal(learned(method), want)
        assert not torch.is_grad_enabled()


def test_distillation_under_inference_mode() -> None:
    held = Denoiser(Small(), EDM, "data", features="mid")
    with torch.inference_mode():
        solver = distill(held, "free_table", nfe=4, shape=(3,), progress=False, trajectories=16)
        with pytest.raises(ValueError, match="made under torch.inference_mode"):
            learned("free_table")
    again = distill(held, "free_table", nfe=4, shape=(3,), progress=False, trajectories=16)
    assert torch.equal(solver.policy.b, again.policy.b)


def drawn() -> Tensor:
    """Start noise and samples of every solver on two processes."""
    parts = []
    for process, grid in ((EDM, GRID), (FLOW, grids.shifted(FLOW, 4))):
        held = Denoiser(Small(), process, "data")
        for maker in (solvers.ipndm, solvers.deis, solvers.unipc, solvers.dpm_solver_2):
            parts.append(Sampler(held, maker(process, grid)).sample([0, 1], (3,)))
    return torch.stack([*parts, seeded_noise([5, 6], (3,))])


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")],
    ids=str,
)
def test_defaults_of_torch_change_nothing(dtype: torch.dtype, device: str | None) -> None:
    """Designers were made, and noise drawn, in torch's default dtype; tables on its default device.

    "meta" stands for a GPU that a number must not land on: what is read there is an error.
    """
    names = ("dlms", "amed", "gits", "free_table")
    want = [drawn(), *(learned(name) for name in names)]
    with defaults(dtype, device):
        got = [drawn(), *(learned(name) for name in names)]
        assert torch.empty(0).dtype == dtype, "the defaults were changed"
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)

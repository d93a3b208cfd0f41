"""Networks of other makes: weights that are buffers, bottlenecks of any form, numbers beside tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlms_engine import Denoiser, Sampler, grids, solvers
from dlms_engine.models import denoiser as denoiser_module
from dlms_engine.processes import EDM


@dataclass
class Output:
    sample: Tensor


class Bottleneck(nn.Module):
    """A module that returns what ``wrap`` makes of its output."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.used, self.wrap = nn.Linear(3, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.used(x))


class Through(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.mid = Bottleneck(wrap)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.mid(x)
        return 0.5 * x


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, None),
        lambda y: [y],
        lambda y: ((y,), 1),
        lambda y: {"sample": y},
        lambda y: Output(y),
    ],
)
def test_a_bottleneck_may_return_what_networks_return(wrap: Any) -> None:
    """Lists, dicts and nested tuples: "'Denoiser' object has no attribute 'last_features'"."""
    network, x = Through(wrap), torch.ones(2, 3)
    denoiser = Denoiser(network, EDM(), "data", features="mid")
    denoiser(x, 1.0)
    assert torch.equal(denoiser.last_features, network.mid.used(x))


@pytest.mark.parametrize("returned", [None, (None, 1), {"hidden": torch.ones(2, 3)}, "text"])
def test_a_bottleneck_without_a_tensor_is_refused_by_name(returned: Any) -> None:
    denoiser = Denoiser(Through(lambda y: returned), EDM(), "data", features="mid")
    denoiser(torch.ones(2, 3), 1.0)
    with pytest.raises(RuntimeError, match="'mid', or that returned no tensor"):
        _ = denoiser.last_features


class _Buffers(nn.Module):
    """Weights that are no parameters."""

    weight0: Tensor

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        for n, dtype in enumerate(dtypes):
            self.register_buffer(f"weight{n}", torch.full((4, 4), 0.1, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x @ self.weight0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_buffers_name_the_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network was called in float32 whatever its weights were."""
    process = EDM()
    table = solvers.ddim(process, grids.polynomial(process, 3))
    x = 80 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(_Buffers(dtype), process)
    assert denoiser.network_dtype == (None if dtype == torch.float32 else dtype)
    assert Sampler(denoiser, table)(x).dtype == denoiser(x, 1.0).dtype == torch.float32
    assert Denoiser(_Buffers(dtype, torch.float32), process).network_dtype is None
    if dtype != torch.float32:
        monkeypatch.setattr(denoiser_module, "buffer_dtype", lambda network: None)
        with pytest.raises(RuntimeError, match="same dtype"):  # planted: as if it said nothing
            Sampler(denoiser, table)(x)


class _Scaled(nn.Module):
    def forward(self, x: Tensor, t: Tensor, rate: Tensor, label: Tensor) -> Tensor:
        assert rate.ndim == 0 and t.shape == (len(x),), "planted: a number a sample"
        return rate * x + label


def test_guidance_leaves_one_number_and_one_time_as_they_are() -> None:
    """A number for all became one for each of both branches, one time two of them."""
    given = {"rate": torch.tensor(2.0), "label": torch.ones(3, 1)}
    null = {"label": torch.zeros(1)}
    denoiser = Denoiser(_Scaled(), EDM(), "data", guidance_scale=1.0, unconditional=null)
    x = torch.ones(3, 4)
    for time in (1.0, torch.tensor([1.0]), torch.ones(3)):
        assert torch.equal(denoiser(x, time, **given), 2 * x + 1)
    with pytest.raises(AssertionError, match="planted"):
        denoiser(x, 1.0, rate=torch.ones(3, 1), label=given["label"])


class _Sometimes(nn.Module):
    """Runs its bottleneck at high noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if float(t[0]) > 10:
            self.mid(x)
        return 0.5 * x


def test_a_call_that_skips_the_bottleneck_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had an earlier call's, and a learned solver's rows with it."""
    denoiser, x = Denoiser(_Sometimes(), EDM(), "data", features="mid"), torch.ones(2, 3)

    def skipped() -> Tensor:
        denoiser(x, 20.0)
        assert denoiser.last_features.shape == (2, 3)
        denoiser(x, 5.0)
        return denoiser.last_features

    with pytest.raises(RuntimeError, match="did not run its module 'mid'"):
        skipped()
    monkeypatch.setattr(denoiser._tap, "keep", lambda value: None)  # planted: nothing is forgotten
    assert skipped().shape == (2, 3)


def test_features_of_a_network_that_was_compiled_before() -> None:
    """Its first graph has no hook; the error said that the module was not run."""
    x = torch.ones(2, 3)
    network: Any = torch.compile(Through(lambda y: y), backend="eager")
    with torch.no_grad():
        Denoiser(network, EDM(), "data")(x, 1.0)
        denoiser = Denoiser(network, EDM(), "data", features="mid")
        denoiser(x, 1.0)
        with pytest.raises(RuntimeError, match="make the Denoiser with features='mid' ahead"):
            _ = denoiser.bottleneck
        torch._dynamo.reset()
        denoiser(x, 1.0)
        assert denoiser.last_features.shape == (2, 3)

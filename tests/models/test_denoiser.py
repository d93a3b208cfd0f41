"""Every prediction type answers the same question, and the tap and guidance do what they say."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dlms_engine import Sampler, processes
from dlms_engine.models.denoiser import PREDICTIONS, Denoiser, find_module, quantile
from dlms_engine.processes import grids
from dlms_engine.solvers import ddim

PROCESSES = {
    "edm": processes.EDM(),
    "vp": processes.VP(),
    "flow": processes.RectifiedFlow(),
}
SIGMA_DATA = 0.5


def raw_network(kind: str, process: processes.Process):
    """What a network of prediction type ``kind`` returns for the mixture, from the definitions."""
    mixture = GaussianMixture(process)

    def network(scaled: Tensor, time: Tensor) -> Tensor:
        t = time if kind != "edm" else process.inverse_sigma(torch.exp(4 * time))
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        level = sigma / alpha
        x = scaled
        if kind == "edm":  # the scaled input is c_in * x / alpha
            x = scaled * (level**2 + SIGMA_DATA**2).sqrt() * alpha
        data = mixture(x, t)
        noise = (x - alpha * data) / sigma
        if kind == "edm":
            skip = SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2)
            out = level * SIGMA_DATA / (level**2 + SIGMA_DATA**2).sqrt()
            return (data - skip * x / alpha) / out
        return {
            "data": data,
            "noise": noise,
            "velocity": alpha * noise - sigma * data,
            "flow": noise - data,
            "reverse_flow": data - noise,
        }[kind]

    return network


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_prediction_gives_the_posterior_mean(kind, process):
    if kind == "velocity" and process.name == "flow":
        pytest.skip("velocity is defined with alpha^2 + sigma^2 = 1")
    denoiser = Denoiser(raw_network(kind, process), process, kind, sigma_data=SIGMA_DATA)
    x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = process.t_min, process.t_max
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64) * (high - low) + low
    expected = GaussianMixture(process)(x, t)
    torch.testing.assert_close(denoiser(x, t), expected, rtol=0, atol=1e-11)
    noise = denoiser.predict(x, t, "noise")
    rebuilt = (x - process.alpha(t)[:, None] * expected) / process.sigma(t)[:, None]
    torch.testing.assert_close(noise, rebuilt, rtol=0, atol=1e-9)


def test_a_wrong_prediction_type_is_seen_by_that_check():
    process = processes.VP()
    denoiser = Denoiser(raw_network("velocity", process), process, "noise")
    x = torch.randn(2, 16, dtype=torch.float64)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    assert (denoiser(x, t) - GaussianMixture(process)(x, t)).abs().max() > 0.1


def test_a_scalar_time_equals_a_time_per_sample():
    process = processes.EDM()
    denoiser = Denoiser(raw_network("data", process), process, "data")
    x = torch.randn(3, 16, dtype=torch.float64)
    t = torch.full((3,), 1.5, dtype=torch.float64)
    assert torch.equal(denoiser(x, 1.5), denoiser(x, t))


def test_noise_coefficients_do_not_cancel_at_low_noise():
    """1 - c_skip is 1.6e-5 at sigma = 0.002: forming it in float32 would lose half the digits."""
    process = processes.EDM()
    denoiser = Denoiser(lambda x, _: x, process, "edm")
    pre = denoiser.preconditioning(torch.tensor(0.002, dtype=torch.float64), "noise")
    assert abs(float(pre.c_skip) - 0.002 / (0.002**2 + 0.25)) < 1e-18


class Conditional(nn.Module):
    """x * label, so that guidance can be computed by hand."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return x * label[:, None]


def test_guidance_mixes_the_two_branches():
    denoiser = Denoiser(
        Conditional(),
        processes.EDM(),
        "data",
        guidance_scale=3.0,
        unconditional={"label": torch.tensor([2.0])},
    )
    x = torch.randn(4, 5)
    out = denoiser(x, 1.0, label=torch.full((4,), 7.0))
    torch.testing.assert_close(out, x * (2.0 + 3.0 * (7.0 - 2.0)))


class Told(nn.Module):
    """Adds up what it is told, however deep."""

    def forward(self, x, t, label=None, added=None):
        told = sum(
            v.float().flatten(1).mean(1) for v in tree_leaves((label, added)) if v is not None
        )
        return x + told.reshape(-1, 1, 1, 1)


NULL = {"added": {"text": {"embedding": torch.zeros(1, 5)}, "pair": (torch.zeros(1, 2), None)}}
GIVEN = {"added": {"text": {"embedding": torch.ones(3, 5)}, "pair": (torch.ones(3, 2), None)}}


def test_guidance_reaches_into_dicts_and_tuples():
    """Only tensors at the top were joined: the others kept one branch's batch."""
    x, t = torch.zeros(3, 1, 2, 2), torch.tensor(0.0)
    denoiser = Denoiser(Told(), processes.EDM(), "data", guidance_scale=3.0, unconditional=NULL)
    uncond, cond = denoiser.network_output(x, t, **GIVEN)
    assert torch.equal(uncond, torch.zeros_like(x)) and torch.equal(cond, 2 * torch.ones_like(x))
    assert len(denoiser.unconditional_read(GIVEN)) == 2


@pytest.mark.parametrize(
    ("unconditional", "given", "message"),
    [
        (
            {"labels": torch.zeros(1)},
            {"label": torch.ones(3)},
            r"has \['labels'\].*gives \['label'\]",
        ),
        ({"label": torch.zeros(1)}, {}, r"has \['label'\], which this call does not give"),
        ({"added": {"texts": torch.zeros(1)}}, GIVEN, r"\['added'\] has \['texts'\]"),
        ({"added": torch.zeros(1)}, GIVEN, "is Tensor, but this call gives dict"),
        ({"added": {"pair": (torch.zeros(1, 2),)}}, GIVEN, "has 1 entries, but this call gives 2"),
        (
            {"label": torch.zeros(1), "mode": 1},
            {"label": torch.ones(3), "mode": 2},
            "only tensors can",
        ),
    ],
)
def test_an_unconditional_branch_that_does_not_fit_is_refused(unconditional, given, message):
    """A misspelt key was ignored: both branches were one, and the guidance did nothing."""
    denoiser = Denoiser(
        Told(), processes.EDM(), "data", guidance_scale=3.0, unconditional=unconditional
    )
    with pytest.raises(ValueError, match=message):
        denoiser.network_output(torch.zeros(3, 1, 2, 2), torch.tensor(0.0), **given)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "3", torch.tensor(2.0)])
def test_a_guidance_scale_that_is_set_later_is_checked_too(scale):
    denoiser = Denoiser(Told(), processes.EDM(), "data", guidance_scale=3.0, unconditional=NULL)
    with pytest.raises(ValueError, match="expected a finite number"):
        denoiser.guidance_scale = scale
    assert denoiser.guidance_scale == 3.0
    denoiser.guidance_scale = None
    plain = Denoiser(Told(), processes.EDM(), "data")
    with pytest.raises(ValueError, match="unconditional is empty"):
        plain.guidance_scale = 2.0


def test_guidance_without_an_unconditional_branch_is_refused():
    with pytest.raises(ValueError, match="unconditional"):
        Denoiser(Conditional(), processes.EDM(), "data", guidance_scale=3.0)


class Tapped(nn.Module):
    """A network with a bottleneck of 6 channels at 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.mid_block = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.inner.mid_block(x).mean()


@pytest.mark.parametrize("path", ["mid_block", "inner.mid_block"])
def test_features_are_the_channel_mean_of_the_bottleneck(path):
    network = Tapped()
    denoiser = Denoiser(network, processes.EDM(), "data", features=path)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        denoiser(x, 1.0)
        expected = network.inner.mid_block(x).mean(1).flatten(1)
    assert denoiser.last_features.shape == (2, 16)
    torch.testing.assert_close(denoiser.last_features, expected)


def test_a_feature_path_that_is_not_there_is_named_with_what_is():
    with pytest.raises(ValueError, match=r"'middle'.*inner"):
        find_module(Tapped(), "middle")


def test_features_before_the_first_call_say_what_to_do():
    with pytest.raises(RuntimeError, match="features='mid_block'"):
        _ = Denoiser(Tapped(), processes.EDM(), "data").last_features


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'epsilon'"):
        Denoiser(lambda x, t: x, processes.EDM(), "epsilon")  # type: ignore[arg-type]


@pytest.mark.parametrize("q", [0.001, 0.3, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 192, 1000])
def test_a_quantile_is_that_of_numpy(q, n):
    values = torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    want = torch.from_numpy(np.quantile(values.numpy(), q, axis=1))
    torch.testing.assert_close(quantile(values, q), want, rtol=1e-13, atol=1e-14)


def test_thresholding_clips_to_the_quantile():
    denoiser = Denoiser(lambda x, t: 3 * x, processes.EDM(), "data", dynamic_thresholding=1.0)
    x = torch.linspace(-1, 1, 11)[None]
    torch.testing.assert_close(denoiser(x, 1.0), x)  # max |3 x| = 3 is the bound
    small = denoiser(x / 10, 1.0)
    torch.testing.assert_close(small, 3 * x / 10)  # never scaled up: the bound is at least 1


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def tapped(network: nn.Module) -> Denoiser:
    return Denoiser(network, processes.EDM(), "data", features="0")


class Wide(nn.Sequential):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x)


def test_a_dropped_denoiser_leaves_no_hook() -> None:
    """Fifty dropped ones left fifty hooks, each with the last bottleneck of its thread."""
    network = Wide(nn.Linear(4, 4), nn.Linear(4, 4))
    for _ in range(50):
        tapped(network)(torch.zeros(1, 4), 1.0)
    gc.collect()
    assert hooks(network) == 0
    kept = tapped(network)
    shared = copy.copy(kept)
    del kept
    gc.collect()
    assert hooks(network) == 1
    shared(torch.ones(1, 4), 1.0)
    assert torch.equal(shared.bottleneck, network[0](torch.ones(1, 4)))
    own = copy.deepcopy(shared)
    del shared
    gc.collect()
    assert hooks(network) == 0
    own(torch.ones(1, 4), 1.0)
    assert torch.equal(own.bottleneck, network[0](torch.ones(1, 4)))


def test_hooks_without_their_finalizer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nobody removes the hooks, as it was."""

    class Idle:
        def __init__(self, *_arguments: object) -> None: ...

    monkeypatch.setattr(weakref, "finalize", Idle)
    network = Wide(nn.Linear(4, 4))
    for _ in range(3):
        tapped(network)
    gc.collect()
    assert hooks(network) == 3


class _Stored(nn.Module):
    """Computes in the dtype of its bias; the weight is kept in float8, as layerwise casting does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return 0.5 * x * self.weight.to(x.dtype) + self.bias


def test_weights_stored_in_float8_do_not_make_its_input_float8() -> None:
    denoiser = Denoiser(_Stored(), processes.EDM(), "data")
    assert denoiser.network_dtype == torch.bfloat16
    table = ddim(denoiser.process, grids.polynomial(denoiser.process, 2))
    samples = Sampler(denoiser, table).sample(range(3), (4,))
    assert samples.dtype == torch.float32 and bool(samples.isfinite().all())
    assert next(denoiser.parameters()).dtype == torch.float8_e4m3fn  # planted: the first of all
    alone = nn.Module()
    alone.weight = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    assert Denoiser(alone, processes.EDM(), "data").network_dtype is None

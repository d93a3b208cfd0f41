"""Processes: closed forms, exact ends, inverses, derivatives, configurations."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlms_engine import processes
from dlms_engine.processes import EDM, VP, Cosine, Process, RectifiedFlow, VPDiscrete

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALL = [EDM(), VP(), VPDiscrete(betas=BETAS), Cosine(), RectifiedFlow()]
IDS = [process.name for process in ALL]
every = pytest.mark.parametrize("process", ALL, ids=IDS)


def interior(process: Process, n: int = 101) -> torch.Tensor:
    s = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    return process.t_min + s * (process.t_max - process.t_min)


def assert_inverts(process: Process, t: torch.Tensor) -> None:
    for name, inverse in (("lambda_", "inverse_lambda"), ("sigma_over_alpha", "inverse_sigma")):
        back = getattr(process, inverse)(getattr(process, name)(t))
        error = ((back - t).abs() / t).max().item()
        assert error < 1e-10, f"{inverse}({name}(t)) is off by {error:.1e}"


@every
def test_coefficients_agree_with_each_other(process: Process) -> None:
    t = interior(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(process.log_alpha(t), alpha.log(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(process.sigma_over_alpha(t), sigma / alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.lambda_(t), (alpha / sigma).log(), rtol=1e-12, atol=1e-12)
    assert (process.lambda_(t).diff() < 0).all()
    if process.name in ("vp", "vp_discrete", "cosine"):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=4e-16 * 4)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ALL), st.floats(1e-6, 1 - 1e-6))
def test_inverses(process: Process, s: float) -> None:
    t = process.t_min + s * (process.t_max - process.t_min)
    assert_inverts(process, torch.tensor([t], dtype=torch.float64))


def test_the_inverse_check_can_fail() -> None:
    class Wrong(VP):
        def inverse_lambda(self, lambda_: torch.Tensor | float) -> torch.Tensor:
            return super().inverse_lambda(lambda_) * (1 + 1e-8)

    with pytest.raises(AssertionError, match="inverse_lambda"):
        assert_inverts(Wrong(), torch.tensor([0.5], dtype=torch.float64))


@every
def test_derivatives(process: Process) -> None:
    t = interior(process, 3).requires_grad_()
    for name in ("alpha", "sigma", "lambda_", "log_alpha", "sigma_over_alpha"):
        assert torch.autograd.gradcheck(getattr(process, name), (t,)), name
    lambda_ = process.lambda_(t.detach()).requires_grad_()
    assert torch.autograd.gradcheck(process.inverse_lambda, (lambda_,))
    ratio = process.sigma_over_alpha(t.detach()).requires_grad_()
    assert torch.autograd.gradcheck(process.inverse_sigma, (ratio,))


def test_floats_and_float32_become_float64_without_losing_the_graph() -> None:
    assert VP().alpha(0.5).dtype == torch.float64
    t = torch.tensor([0.5], dtype=torch.float32, requires_grad=True)
    (grad,) = torch.autograd.grad(VP().sigma(t).sum(), t)
    assert grad.dtype == torch.float32 and grad.item() > 0


def test_edm_is_exact() -> None:
    t = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64)
    process = EDM()
    assert torch.equal(process.sigma(t), t) and torch.equal(
        process.alpha(t), torch.ones(3).double()
    )
    assert torch.equal(process.inverse_sigma(t), t)


def test_vp_published_numbers() -> None:
    # sigma range of the linear VP model: 0.010486 at t = 1e-3, 152.167 at t = 1
    process = VP()
    assert process.sigma_over_alpha(1e-3).item() == pytest.approx(0.010485993, rel=1e-6)
    assert process.sigma_over_alpha(1.0).item() == pytest.approx(152.166970, rel=1e-7)
    # small t, where 1 - exp(-x) computed naively loses half the digits
    t = 1e-9
    assert process.sigma(t).item() == pytest.approx((t * (19.9 * t / 2 + 0.1)) ** 0.5, rel=1e-9)


def test_fitted_line() -> None:
    line = VP.fitted(0.002, 80.0)
    assert line.beta_d == pytest.approx(17.537956987, rel=1e-9)
    assert line.beta_min == pytest.approx(-0.004768986, rel=1e-6)
    assert line.sigma_over_alpha(1e-3).item() == pytest.approx(0.002, rel=1e-12)
    assert line.sigma_over_alpha(1.0).item() == pytest.approx(80.0, rel=1e-12)
    adm = VP.fitted(float(VP().sigma_over_alpha(1e-3)), float(VP().sigma_over_alpha(1.0)))
    assert (adm.beta_d, adm.beta_min) == pytest.approx((19.9, 0.1), rel=1e-10)
    assert_inverts(line, interior(line))


def test_fitted_line_of_a_narrow_range_is_the_default_line() -> None:
    line = VP.fitted(0.1, 10.0)
    assert (line.beta_d, line.beta_min) == (19.9, 0.1)
    assert line.sigma_over_alpha(line.t_min).item() == pytest.approx(0.1, rel=1e-12)
    assert line.sigma_over_alpha(line.t_max).item() == pytest.approx(10.0, rel=1e-12)


def test_discrete_goes_through_its_levels() -> None:
    process = VPDiscrete(betas=BETAS)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    cumprod = torch.cumprod(1 - BETAS, 0)
    torch.testing.assert_close(process.alpha(t) ** 2, cumprod, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        process.timestep(t), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-10
    )
    # the levels of Stable Diffusion 1
    assert process.sigma_over_alpha(1.0).item() == pytest.approx(14.614641, rel=1e-6)
    assert process.sigma_over_alpha(1e-3).item() == pytest.approx(0.029167158, rel=1e-6)
    assert process.sigma(0.0).item() == 0 and process.alpha(0.0).item() == 1
    middle = process.log_alpha((t[4] + t[5]) / 2)
    expected = (process.log_alpha(t[4]) + process.log_alpha(t[5])) / 2
    assert middle.item() == pytest.approx(expected.item(), rel=1e-12)


def test_discrete_from_either_table() -> None:
    one = VPDiscrete(betas=BETAS)
    other = VPDiscrete(alphas_cumprod=torch.cumprod(1 - BETAS, 0))
    t = torch.linspace(0.001, 1, 77, dtype=torch.float64)
    torch.testing.assert_close(one.lambda_(t), other.lambda_(t), rtol=1e-10, atol=1e-10)


def test_flow_ends_are_exact() -> None:
    process = RectifiedFlow()
    assert process.alpha(1.0).item() == 0 and process.sigma(0.0).item() == 0
    assert process.lambda_(1.0).item() == -torch.inf and process.lambda_(0.0).item() == torch.inf
    assert process.inverse_lambda(-torch.inf).item() == 1
    assert process.inverse_lambda(torch.inf).item() == 0
    assert process.inverse_sigma(torch.inf).item() == 1 and process.inverse_sigma(0.0).item() == 0


def test_cosine_near_its_ends() -> None:
    process = Cosine()
    assert process.sigma(0.0).item() == 0 and process.alpha(0.0).item() == 1
    assert process.alpha(process.t_max).item() > 0


@every
def test_config_round_trip(process: Process) -> None:
    again = processes.from_config(json.loads(json.dumps(process.config())))
    assert again == process and hash(again) == hash(process)
    t = interior(process, 5)
    assert torch.equal(again.alpha(t), process.alpha(t))
    assert process.name in repr(process).lower() or type(process).__name__ in repr(process)


def test_processes_differ_by_their_numbers() -> None:
    assert EDM() != EDM(t_min=0.01) and EDM() != VP() and EDM() != "edm"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(t_min=2.0, t_max=1.0), "t_min is 2.0"),
        (lambda: EDM(t_max=float("inf")), "t_max is inf"),
        (lambda: VP(beta_d=-1.0), "beta_d is -1.0"),
        (lambda: VP(beta_min=-1.0), "beta_min is -1.0"),
        (lambda: Cosine(t_max=1.0), "t_max is 1.0"),
        (lambda: RectifiedFlow(t_max=1.5), "t_max is 1.5"),
        (lambda: VPDiscrete(), "exactly one"),
        (lambda: VPDiscrete(betas=BETAS, alphas_cumprod=BETAS), "exactly one"),
        (lambda: VPDiscrete(betas=[0.1]), "N >= 2"),
        (lambda: VPDiscrete(alphas_cumprod=[0.9, 0.0]), "zero terminal SNR"),
        (lambda: VPDiscrete(alphas_cumprod=[0.5, 0.9]), "falling"),
        (lambda: processes.from_config({"name": "ve"}), "'ve'"),
        (lambda: processes.from_config({"name": "edm", "sigma": 3}), "sigma"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_line_through_zero_has_a_time_without_noise() -> None:
    """VP with beta_min = 0: the time of sigma = 0 was 0 / 0."""
    for beta_min in (0.0, 0.1):
        line = VP(beta_d=20.0, beta_min=beta_min)
        assert float(line.inverse_sigma(0.0)) == 0.0
        assert float(line.inverse_sigma(line.sigma_over_alpha(0.3))) == pytest.approx(
            0.3, abs=1e-14
        )

"""Clipped data predictions: under gradients, after an analytical first step, and in saved configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine import grids, solvers  # noqa: E402
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402
from dlms_engine.integrations.scheduler.state import State  # noqa: E402
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings  # noqa: E402

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)


def run(solver: str, weight: Tensor) -> Tensor:
    scheduler = DLMSScheduler(**CONFIG, solver=solver, clip_sample=True)
    scheduler.set_timesteps(4)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(weight * torch.tanh(x), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("solver", ["ddim", "unipc", "ipndm"])
def test_gradients_change_no_number(solver: str) -> None:
    """A network with trainable weights outside ``no_grad``: its predictions were not clipped."""
    weight = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        expected = run(solver, weight)
        up, down = (run(solver, weight + sign * 1e-6).sum() for sign in (1, -1))
    found = run(solver, weight)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), weight)
    assert float(grad) == pytest.approx(float(up - down) / 2e-6, rel=1e-4)


def after_one_step(solver: str) -> tuple[Tensor, Tensor]:
    """The first step of a solver with an analytical first step, and the same by hand."""
    options = {"afs": True}
    scheduler = DLMSScheduler(**CONFIG, solver=solver, clip_sample=True, solver_options=options)
    scheduler.set_timesteps(3)
    x, t = 2 * noise(), scheduler.timesteps[0]
    f = torch.tanh(scheduler.scale_model_input(x, t))
    found = scheduler.step(f, t, x, return_dict=False)[0]
    rows = scheduler._runner._rows
    assert rows.scale != 1
    process = scheduler.noise_model.process
    alpha, sigma = process.alpha(rows.times[0]), process.sigma(rows.times[0])
    state = 2 * noise() * rows.scale
    data = (state - sigma * f) / alpha
    clipped = data.clamp(-1, 1)
    a, b = rows.a[0], rows.b[0, 0]
    if rows.prediction == "noise":
        return found, a * state + b * (state - alpha * clipped) / sigma
    if solver == "ddim":  # keeps the noise of the prediction that was not clipped
        return found, (b + alpha * a) * clipped + a * (state - alpha * data)
    return found, a * state + b * clipped


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "dpm_solver_pp"])
def test_an_analytical_first_step_clips_the_rescaled_state(solver: str) -> None:
    found, expected = after_one_step(solver)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "ipndm"])
def test_a_state_that_is_not_rescaled_is_seen(solver: str, monkeypatch: Any) -> None:
    right = State._clipped

    def unscaled(self: State, n: int, *rest: Any) -> Any:
        object.__setattr__(self.plan, "scale", 1.0)
        return right(self, n, *rest)

    monkeypatch.setattr(State, "_clipped", unscaled)
    found, expected = after_one_step(solver)
    assert (found - expected).abs().max() > 1e-3


def learned(**options: Any) -> tuple[Any, Any]:
    process = DLMSScheduler(**CONFIG).noise_model.process
    table = solvers.ipndm(process, grids.time_uniform(process, 4))
    return table, DLMSScheduler.from_config(
        diffusers.DDIMScheduler(**CONFIG).config, solver=table, **options
    )


def test_clipping_that_was_asked_for_is_saved(tmp_path: Any) -> None:
    """A learned solver's config lost it on the way through a file."""
    table, asked = learned(clip_sample=True)
    asked.save_pretrained(tmp_path)
    assert DLMSScheduler.from_pretrained(tmp_path).config.clip_sample is True
    # what belongs to another solver's config still gives way
    assert learned()[1].config.clip_sample is False
    handcrafted = DLMSScheduler(**CONFIG, solver="ddim", clip_sample=True)
    assert DLMSScheduler.from_config(handcrafted.config, solver=table).config.clip_sample is False


def per_sample() -> DesignerPolicy:
    process = DLMSScheduler(**CONFIG).noise_model.process
    settings = DesignerSettings(
        steps=3, order=2, afs=False, features=4, coordinate="linear", prediction="data"
    )
    weights = torch.zeros(3, 2, dtype=torch.float64)
    weights[:, 0] = 1.0
    return DesignerPolicy(Designer(settings, process, grids.time_uniform(process, 3), weights))


class Network(nn.Module):
    """``[B, 3, 4, 4]``; its bottleneck has four places."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()
        self.times: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        self.times.append(torch.as_tensor(timestep))
        self.mid_block(sample[:, :, :2, :2])
        return 0.5 * torch.tanh(sample)


def test_rows_of_every_sample_refuse_to_clip() -> None:
    """They ran unclipped, whatever the config said."""
    scheduler = DLMSScheduler(**CONFIG, solver=per_sample(), clip_sample=True)
    scheduler.watch(Network())
    with pytest.raises(ValueError, match="clip_sample is True"):
        scheduler.set_timesteps(3)
    plain = DLMSScheduler(**CONFIG, solver=per_sample())
    plain.watch(Network())
    plain.set_timesteps(3)


def test_samples_that_are_gone_leave_no_times_behind() -> None:
    """After latents of another shape the rows are nominal ones, and so are the network's times."""
    scheduler, network = DLMSScheduler(**CONFIG, solver=per_sample()), Network()
    scheduler.watch(network)
    scheduler.set_timesteps(3)
    x = noise().float()
    for n, t in enumerate(scheduler.timesteps):
        out = network(x, t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        if n == 0:  # the batch loses a sample; the second call still has times of its own
            assert scheduler._watch.ratio is not None
            x = x[:1]
            scheduler._watch.ratio = scheduler._watch.ratio[:1]
    assert network.times[2].ndim == 0 and float(network.times[2]) == float(scheduler.timesteps[2])

"""What changes between runs counts, what cannot work is refused when the sampler is made, and what is not
finite is reported with its evaluation."""

import logging

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

from dlms_engine import Denoiser, Sampler, grids, processes, solvers
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.corrector import CorrectedPolicy, Corrector, CorrectorSettings
from dlms_engine.policies.designer import Designer, DesignerSettings
from dlms_engine.policies.dlms import DesignerPolicy

PROCESS = processes.EDM()
TABLE = solvers.dpm_solver_pp(PROCESS, grids.polynomial(PROCESS, 5), order=2)
NOISE = 80 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def network(x, t, c=None):
    y = x * (0.25 / (0.25 + t.reshape(-1, 1, 1, 1) ** 2))
    return y if c is None else y + 0.1 * c.reshape(-1, 1, 1, 1)


def guided(scale):
    options = {"guidance_scale": scale, "unconditional": {"c": torch.zeros(1)}}
    return Sampler(Denoiser(network, PROCESS, "data", **options), TABLE)


@pytest.mark.parametrize("watched", [False, True])
def test_a_changed_guidance_scale_counts_in_the_next_run(watched):
    """A sampler with a table kept the scale that it was made with; one with a policy did not."""
    options = {"callback": lambda step: None} if watched else {}
    sampler, c = guided(3.0), torch.ones(2)
    before = sampler(NOISE, c=c, **options)
    sampler.denoiser.guidance_scale = 7.5
    after = sampler(NOISE, c=c, **options)
    assert torch.equal(after, guided(7.5)(NOISE, c=c)) and not torch.equal(after, before)
    sampler.denoiser.guidance_scale = 3.0
    assert torch.equal(sampler(NOISE, c=c, **options), before)
    for scale in range(40):  # plans are kept, but not without end
        sampler.denoiser.guidance_scale = float(scale)
        sampler(NOISE, c=c)
    assert len(sampler._plans) <= 16


def test_a_float64_state_with_a_float32_network_is_refused_at_once():
    denoiser = Denoiser(nn.Conv2d(3, 3, 1), PROCESS, "data")
    with pytest.raises(ValueError, match="parameters are torch.float32: a float64 state needs"):
        Sampler(denoiser, TABLE, dtype=torch.float64)
    Sampler(Denoiser(nn.Conv2d(3, 3, 1).double(), PROCESS, "data"), TABLE, dtype=torch.float64)
    Sampler(Denoiser(network, PROCESS, "data"), TABLE, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("spoilt", [0, 3])
def test_samples_that_are_not_finite_are_reported_once_with_the_evaluation(backend, spoilt, caplog):
    calls = []

    def bad(x, t):
        calls.append(len(calls))
        return network(x, t) * (float("nan") if (len(calls) - 1) % 5 == spoilt else 1.0)

    sampler = Sampler(Denoiser(bad, PROCESS, "data"), TABLE, backend=backend)
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        assert sampler(NOISE).isnan().any()
        sampler(NOISE)
    assert caplog.text.count("not finite") == 1
    assert f"from evaluation {spoilt + 1} of 5 on" in caplog.text
    caplog.clear()
    quiet = Sampler(Denoiser(bad, PROCESS, "data"), TABLE, backend=backend, check_finite=False)
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        quiet(NOISE)
    assert not caplog.records


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_samples_that_are_not_finite_are_reported_whatever_the_noise_lies_like(backend, caplog):
    """The run that finds the evaluation was refused noise that is not contiguous."""
    denoiser = Denoiser(lambda x, t: x * torch.inf, PROCESS, "data")
    noise = NOISE.to(memory_format=torch.channels_last)
    Sampler(denoiser, TABLE, backend=backend)(noise)
    assert "not finite from evaluation 1 of" in caplog.text


def learned(kind):
    """A sampler on a network elsewhere, before its first run there."""
    grid = grids.polynomial(PROCESS, 2)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    settings = DesignerSettings(2, 2, afs=False, features=0)
    corrector = Corrector(CorrectorSettings("image", 3, 1))
    policy = {
        "dlms": lambda: DesignerPolicy(Designer(settings, PROCESS, grid, weights)),
        "amed": lambda: AmedPolicy(AmedPredictor(bottleneck=False), AmedBase(), PROCESS, grid),
        "corrected": lambda: CorrectedPolicy(TABLE, corrector),
    }[kind]()
    sampler = Sampler(Denoiser(nn.Identity(), PROCESS, "data"), policy)
    return sampler, sampler.correctors or getattr(policy, "designer", None) or policy.predictor


@pytest.mark.parametrize("kind", ["dlms", "amed", "corrected"])
def test_what_is_moved_in_inference_mode_can_be_changed_later(kind):
    """The first run moves it; outside of inference mode its tensors take no numbers and no gradients."""
    sampler, module = learned(kind)
    with torch.inference_mode():
        if sampler.correctors is not None:
            sampler._placed_correctors(torch.device("meta"))
        else:
            sampler.policy.place(torch.device("meta"))
    assert next(module.parameters()).device.type == "meta"
    module.load_state_dict(module.state_dict())
    module.requires_grad_(True)


def test_the_progress_bar_of_a_run_that_fails_is_taken_away():
    """Held by the traceback, as a prompt does, it pushed every later bar one line down."""

    def failing(x, t):
        raise RuntimeError("out of luck")

    sampler = Sampler(Denoiser(failing, PROCESS, "data"), TABLE)
    before = set(tqdm._instances)
    with pytest.raises(RuntimeError, match="out of luck") as failed:
        sampler.sample([0], (4,), progress=True)
    assert failed.tb is not None and set(tqdm._instances) <= before

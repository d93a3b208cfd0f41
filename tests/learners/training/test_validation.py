"""The fixed validation: few samples at a time, each with its own number."""

from __future__ import annotations

from typing import Any

import torch
from mixture_network import mixture_denoiser

from dlms_engine.engine.sampler import Sampler
from dlms_engine.learners.training.validation import Validation
from dlms_engine.processes import grids
from dlms_engine.solvers import dpm_solver_pp


def validation(denoiser: Any, samples: int) -> Validation:
    return Validation(denoiser, (16,), samples, 8, None, "rmse", {})


def test_sixteen_samples_at_a_time_give_the_figures_of_all_at_once() -> None:
    """64 latents of a large model with guidance do not fit on a device that trains on four."""
    denoiser = mixture_denoiser()
    sizes: set[int] = set()
    told: list[int] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    denoiser.first_sample = told.append
    checked = validation(denoiser, 40)
    sampler = Sampler(
        denoiser, dpm_solver_pp(denoiser.process, grids.polynomial(denoiser.process, 5))
    )
    figures = checked.measure(sampler, {})
    handle.remove()
    assert sizes == {16, 8} and told == [0, 16, 32] * 2
    noise, exact = checked.pair()
    whole = (sampler(noise) - exact).square().mean().sqrt()
    torch.testing.assert_close(figures["rmse"], float(whole), rtol=1e-5, atol=0)
    part = (sampler(noise[:16]) - exact[:16]).square().mean().sqrt()
    assert abs(figures["rmse"] - float(part)) > 1e-4  # planted: the first part alone

"""A thousand random configurations against the diffusers class of the same name: grid and one run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CLASSES = {
    "dpm_solver_pp": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "ddim": "DDIMScheduler",
}
GRID, RUN = 1e-6, 1e-5
LONGEST_RUN = 24  # steps; longer schedules are compared by their grid only


def draw_vp(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Solver, class and config of a variance-preserving model."""
    solver = rng.choice(list(CLASSES))
    schedule = rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])
    config: dict[str, Any] = {
        "beta_schedule": schedule,
        "prediction_type": rng.choice(["epsilon", "v_prediction", "sample"]),
        "timestep_spacing": rng.choice(["linspace", "leading", "trailing"]),
        "steps_offset": rng.choice([0, 1]),
    }
    if schedule == "scaled_linear":
        config |= {"beta_start": 0.00085, "beta_end": 0.012}
    if solver == "ddim":
        return solver, CLASSES[solver], config | {
            "set_alpha_to_one": rng.random() < 0.5,
            "clip_sample": rng.random() < 0.3,
            "thresholding": rng.random() < 0.15,
        }  # fmt: skip
    config |= {"solver_order": rng.choice([1, 2, 3]), "lower_order_final": rng.random() < 0.8}
    modifier = rng.choice([None, None, "karras", "exponential", "beta"])
    if modifier is not None:
        config[f"use_{modifier}_sigmas"] = True
    if solver != "deis":
        config["final_sigmas_type"] = rng.choice(["zero", "sigma_min"])
    if solver == "unipc" and rng.random() < 0.3:
        config["solver_type"] = "bh1"
    if solver == "dpm_solver_pp" and config["solver_order"] < 3 and rng.random() < 0.3:
        config["solver_type"] = "heun"
    return solver, CLASSES[solver], config


def draw_flow(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Solver, class and config of a flow model."""
    solver = rng.choice(["dpm_solver_pp", "unipc", "deis", "flow_match", "flow_match"])
    shift = rng.choice([1.0, 3.0, 5.0, 8.0])
    if solver == "flow_match":
        config = {
            "shift": shift,
            "use_dynamic_shifting": rng.random() < 0.4,
            "time_shift_type": rng.choice(["exponential", "linear"]),
            "shift_terminal": rng.choice([None, None, 0.1]),
            "invert_sigmas": rng.random() < 0.2,
        }
        modifier = rng.choice([None, None, None, "karras", "exponential", "beta"])
        if modifier is not None and not config["invert_sigmas"]:
            config[f"use_{modifier}_sigmas"] = True
        return "ddim", "FlowMatchEulerDiscreteScheduler", config
    config = {
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "prediction_type": "flow_prediction",
        "solver_order": rng.choice([1, 2, 3]),
        "lower_order_final": rng.random() < 0.8,
    }
    if solver == "unipc":
        config["final_sigmas_type"] = rng.choice(["zero", "sigma_min"])
    return solver, CLASSES[solver], config


def network(x: torch.Tensor) -> torch.Tensor:
    """Any smooth function: what is compared is the scheduler."""
    return 0.3 * torch.sin(x) + 0.1 * x


def run(scheduler: Any, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # rounded times may be there twice
    for t in scheduler.timesteps:
        x = scheduler.step(network(x), t, x, return_dict=False)[0]
    return x


def compare(rng: random.Random, kind: str) -> tuple[str, float, float] | None:
    """Description, largest difference of the grids, relative difference of one run."""
    solver, name, config = draw_vp(rng) if kind == "vp" else draw_flow(rng)
    steps = round(10 ** rng.triangular(0, 3, 0.7))
    described = f"{name} steps {steps} {config}"
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if config.get("use_dynamic_shifting"):
        arguments["mu"] = rng.choice([0.3, 0.8, 1.2])
    if name.startswith("FlowMatch") and rng.random() < 0.2:
        arguments["sigmas"] = np.linspace(1.0, rng.choice([1 / steps, 0.1]), steps).tolist()
    try:
        reference = getattr(diffusers, name)(**config)
        reference.set_timesteps(**arguments)
    except (ValueError, IndexError, AssertionError, ZeroDivisionError):
        return None  # diffusers itself refuses it
    levels = reference.sigmas.double() if hasattr(reference, "sigmas") else None
    times = reference.timesteps.double().diff()
    usable = levels is None or (
        bool(levels.isfinite().all()) and bool((levels[:-1].diff() != 0).all())
    )
    if not usable or len(reference.timesteps) != steps:
        return None  # levels twice or not a number: diffusers' own run has no meaning
    if solver == "ddim" and kind == "vp" and not bool((times < 0).all()):
        return None
    own = DLMSScheduler.from_config(reference.config, solver=solver)
    own.set_timesteps(**arguments)
    if levels is None:
        gap = float((own.timesteps.double() - reference.timesteps.double()).abs().max())
    else:
        scale = levels.abs().clamp(min=1.0)
        gap = float(((own.sigmas.double() - levels).abs() / scale).max())
    if steps > LONGEST_RUN:
        return described, gap, 0.0
    dtype = torch.float32
    if solver == "deis":  # differences of large terms, which diffusers rounds to float32
        dtype, reference.sigmas = torch.float64, reference.sigmas.double()
    try:
        expected = run(reference, dtype)
    except RuntimeError:
        return described, gap, 0.0  # diffusers' UniPC has no weights for two equal levels
    found = run(own, dtype)
    if not bool(expected.isfinite().all()):
        return described, gap, 0.0
    return described, gap, float((expected - found).abs().max() / expected.abs().max())


def sweep(count: int, kind: str, seed: int) -> tuple[list[str], int]:
    """What differs among ``count`` draws, and how many could be compared."""
    rng, wrong, compared = random.Random(seed), list[str](), 0
    for _ in range(count):
        outcome = compare(rng, kind)
        if outcome is None:
            continue
        compared += 1
        described, gap, off = outcome
        if not gap <= GRID or not off <= RUN:
            wrong.append(f"grid {gap:.1e} run {off:.1e}: {described}")
    return wrong, compared


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_random_configs_are_those_of_diffusers(kind: str) -> None:
    wrong, compared = sweep(120, kind, seed=1)
    assert compared > 90
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_a_thousand_random_configs_are_those_of_diffusers(kind: str) -> None:
    wrong, compared = sweep(500, kind, seed=0)
    assert compared > 400
    assert not wrong, "\n".join(wrong)


def test_the_sweep_sees_a_grid_that_is_not_the_pipelines(monkeypatch: Any) -> None:
    """FlowMatchEuler's rule for every flow, which was the fault, must not pass."""
    from dlms_engine.integrations.scheduler import adopt

    monkeypatch.setattr(adopt, "FLOW_GRIDS", {})
    wrong, _ = sweep(30, "flow", seed=1)
    assert len(wrong) > 3

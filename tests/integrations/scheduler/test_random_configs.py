"""A thousand random configurations against the diffusers class of the same name: grid and one run."""

from __future__ import annotations

import copy
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
REFUSED = (
    "algorithm_type", "predict_x0", "disable_corrector", "stochastic_sampling", "euler_at_final",
    "solver_type", "use_flow_sigmas", "sigma_max", "strictly decreasing",
)  # fmt: skip
"""Keys of the refusals that may come; DPM-Solver++ may end above its last flow level."""
LONGEST_RUN = 24  # steps; longer schedules are compared by their grid only


def chance(rng: random.Random, p: float, key: str, *values: Any) -> dict[str, Any]:
    """``{key: one of values}`` with probability ``p``, else nothing: the class's default."""
    return {key: rng.choice(values)} if rng.random() < p else {}


def draw_betas(rng: random.Random, levels: int) -> dict[str, Any]:
    if rng.random() < 0.15:
        return {"trained_betas": np.linspace(1e-4, rng.choice([0.015, 0.03]), levels).tolist()}
    schedule = rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    return {"beta_schedule": schedule, **(ends if rng.random() < 0.5 else {})}


def draw_vp(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Solver, class and config of a variance-preserving model."""
    solver = rng.choice(list(CLASSES))
    levels = chance(rng, 0.3, "num_train_timesteps", 100, 250, 999, 2000)
    config: dict[str, Any] = {
        **levels,
        **draw_betas(rng, levels.get("num_train_timesteps", 1000)),
        "prediction_type": rng.choice(["epsilon", "v_prediction", "sample"]),
        **chance(rng, 0.8, "timestep_spacing", "linspace", "leading", "trailing"),
        **chance(rng, 0.6, "steps_offset", 0, 1, 3),
        **chance(rng, 0.2, "thresholding", True),
        **chance(rng, 0.2, "dynamic_thresholding_ratio", 0.9),
        **chance(rng, 0.2, "sample_max_value", 1.5, 3.0),
    }
    if solver != "deis":
        config |= chance(rng, 0.2, "rescale_betas_zero_snr", True)
    if solver == "ddim":
        config |= {
            **chance(rng, 0.7, "set_alpha_to_one", True, False),
            **chance(rng, 0.7, "clip_sample", True, False, False),
            **chance(rng, 0.3, "clip_sample_range", 0.5, 2.0),
        }
        return solver, CLASSES[solver], config
    config |= {**draw_multistep(rng, solver), **chance(rng, 0.5, "use_karras_sigmas", False)}
    modifier = rng.choice([None, None, "karras_sigmas", "exponential_sigmas", "beta_sigmas"])
    if solver == "dpm_solver_pp":
        modifier = rng.choice([modifier, modifier, "lu_lambdas"])
        # learned variances are cut off for predicted noise only
        kinds = ("learned_range", "learned") if config["prediction_type"] == "epsilon" else (None,)
        config |= chance(rng, 0.2, "variance_type", *kinds)
        config |= chance(rng, 0.2, "lambda_min_clipped", -5.1, -4.0)
        config |= chance(rng, 0.1, "algorithm_type", "dpmsolver", "sde-dpmsolver++")
    if modifier is not None:
        config[f"use_{modifier}"] = True
        if solver == "unipc":
            config |= {**chance(rng, 0.4, "sigma_min", 0.03), **chance(rng, 0.4, "sigma_max", 8.0)}
    if solver == "unipc":
        config |= {
            **chance(rng, 0.05, "predict_x0", False),
            **chance(rng, 0.05, "disable_corrector", [0]),
        }
    return solver, CLASSES[solver], config


def draw_multistep(rng: random.Random, solver: str) -> dict[str, Any]:
    """What the multistep classes have in common, for both kinds of models."""
    types = {"unipc": ("bh1", "bh2"), "dpm_solver_pp": ("heun", "midpoint")}
    ends = chance(rng, 0.6, "final_sigmas_type", "zero", "sigma_min") if solver != "deis" else {}
    final = chance(rng, 0.15, "euler_at_final", True) if solver == "dpm_solver_pp" else {}
    return {
        **chance(rng, 0.8, "solver_order", 1, 2, 3),
        **chance(rng, 0.5, "lower_order_final", True, False),
        **chance(rng, 0.4, "solver_type", *types.get(solver, ("logrho",))),
        **ends,
        **final,
    }


def draw_flow(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Solver, class and config of a flow model."""
    solver = rng.choice(["dpm_solver_pp", "unipc", "deis", "flow_match", "flow_match"])
    config = {
        **chance(rng, 0.25, "num_train_timesteps", 100, 500, 2000),
        **chance(rng, 0.3, "use_dynamic_shifting", True),
        **chance(rng, 0.5, "time_shift_type", "exponential", "linear"),
    }
    if solver == "flow_match":
        config |= {
            **chance(rng, 0.8, "shift", 0.5, 1.0, 3.0, 5.0, 12.0),
            **chance(rng, 0.3, "shift_terminal", 0.1, 0.02),
            **chance(rng, 0.2, "invert_sigmas", True),
            **chance(rng, 0.1, "stochastic_sampling", True),
        }
        modifier = rng.choice([None, None, None, "karras", "exponential", "beta"])
        return "ddim", "FlowMatchEulerDiscreteScheduler", {
            **config, **({f"use_{modifier}_sigmas": True} if modifier else {}),
        }  # fmt: skip
    config |= {
        "use_flow_sigmas": True,
        "prediction_type": rng.choice([*["flow_prediction"] * 8, "sample", "v_prediction"]),
        **chance(rng, 0.8, "flow_shift", 0.5, 1.0, 3.0, 5.0, 8.0),
        **chance(rng, 0.1, "thresholding", True),
        **chance(rng, 0.3, "beta_schedule", "scaled_linear"),
        **draw_multistep(rng, solver),
    }
    if solver == "unipc":
        config |= chance(rng, 0.3, "shift_terminal", 0.1, 0.02)
        if rng.random() < 0.2:
            config |= {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    return solver, CLASSES[solver], config


def draw_arguments(rng: random.Random, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Of ``set_timesteps``: a number of steps, and what some classes take beside it."""
    steps = round(10 ** rng.triangular(0, 3, 0.7))
    given: dict[str, Any] = {"num_inference_steps": steps}
    if config.get("use_dynamic_shifting"):
        given["mu"] = rng.choice([0.3, 0.8, 1.2])
    takes = name.startswith("FlowMatch") or (
        name.startswith("UniPC") and config.get("use_flow_sigmas")
    )
    if takes and rng.random() < 0.2:
        # 1 / steps, FLUX's own end, counts as none given for the multistep rules
        ends = [0.015, 0.11] if name.startswith("UniPC") else [1 / steps, 0.1]
        given["sigmas"] = np.linspace(1.0, rng.choice(ends), steps)
    plain = not any(key.startswith("use_") and value for key, value in config.items())
    if name.startswith("DPM") and plain and rng.random() < 0.2:
        levels = config.get("num_train_timesteps", 1000)
        given = {"timesteps": sorted(rng.sample(range(levels), min(steps, 90)), reverse=True)}
    return given


def network(x: torch.Tensor) -> torch.Tensor:
    """Any smooth function: what is compared is the scheduler."""
    return 0.3 * torch.sin(x) + 0.1 * x


def run(scheduler: Any, dtype: torch.dtype, learned: bool) -> torch.Tensor:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # rounded times may be there twice
    for t in scheduler.timesteps:
        output = network(x)
        output = torch.cat([output, output], dim=1) if learned else output
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def usable(reference: Any, steps: int) -> bool:
    """Whether diffusers' own run has a meaning: as many steps as asked for, noise that falls."""
    if len(reference.timesteps) != steps:
        return False
    if not hasattr(reference, "sigmas"):  # DDIM
        return bool((reference.timesteps.diff() < 0).all())
    levels = reference.sigmas.double()
    turned = -1 if reference.config.get("invert_sigmas") else 1
    return bool(levels.isfinite().all()) and bool((turned * levels[:-1].diff() < 0).all())


def run_gap(reference: Any, own: Any, learned: bool) -> float:
    """Relative difference of one run; in float64 where float32 is not enough for diffusers."""
    gap = 0.0
    for dtype in (torch.float32, torch.float64):
        for scheduler in (reference, own):
            scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
            scheduler._step_index = None
        if dtype == torch.float64:
            if not hasattr(reference, "sigmas"):
                break
            reference.sigmas = reference.sigmas.double()
        try:
            expected = run(copy.deepcopy(reference), dtype, learned)
        except RuntimeError:
            return 0.0  # diffusers' UniPC has no weights for two equal levels
        if not bool(expected.isfinite().all()):
            return 0.0
        found = run(copy.deepcopy(own), dtype, learned)
        gap = float((expected - found).abs().max() / expected.abs().max())
        if gap <= RUN:
            break
    return gap


def compare(rng: random.Random, kind: str) -> tuple[str, float, float] | None:
    """Description, largest difference of the grids, relative difference of one run."""
    solver, name, config = draw_vp(rng) if kind == "vp" else draw_flow(rng)
    arguments = draw_arguments(rng, name, config)
    steps = arguments.get("num_inference_steps") or len(arguments["timesteps"])
    shown = {k: v for k, v in {**arguments, **config}.items() if np.size(v) < 9}
    described = f"{name} steps {steps} {shown}"
    try:
        reference = getattr(diffusers, name)(**config)
        reference.set_timesteps(**arguments)
    except (ValueError, IndexError, AssertionError, ZeroDivisionError):
        return None  # diffusers itself refuses it
    if not usable(reference, steps):
        return None
    try:
        own = DLMSScheduler.from_config(reference.config, solver=solver)
        own.set_timesteps(**arguments)
    except ValueError as exc:
        assert any(key in str(exc) for key in REFUSED), f"{described}: {exc}"
        return None
    if hasattr(reference, "sigmas"):
        levels = reference.sigmas.double()
        gap = float(((own.sigmas.double() - levels).abs() / levels.abs().clamp(min=1.0)).max())
    else:
        gap = float((own.timesteps.double() - reference.timesteps.double()).abs().max())
    if steps > LONGEST_RUN:
        return described, gap, 0.0
    learned = str(config.get("variance_type")).startswith("learned")
    return described, gap, run_gap(reference, own, learned)


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
    wrong, compared = sweep(60, kind, seed=1)
    assert compared > 40
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_a_thousand_random_configs_are_those_of_diffusers(kind: str) -> None:
    wrong, compared = sweep(620, kind, seed=0)
    assert compared > 500
    assert not wrong, "\n".join(wrong)


def test_the_sweep_sees_a_grid_that_is_not_the_pipelines(monkeypatch: Any) -> None:
    """FlowMatchEuler's rule for every flow, which was the fault, must not pass."""
    from dlms_engine.integrations.scheduler import adopt

    monkeypatch.setattr(adopt, "FLOW_GRIDS", {})
    wrong, _ = sweep(20, "flow", seed=1)
    assert len(wrong) > 1

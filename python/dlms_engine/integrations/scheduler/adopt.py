"""Reading the config of another scheduler class as what that class would have run.

Keys that describe the noise model are kept, defaults included. Keys that describe the grid of a
variance-preserving model are read as diffusers' own swap reads them: a value that was only the other
class's default gives way to the default of the class whose solver is asked for. What is not
understood is refused by key and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .foreign_class import READ_CLASSES, class_of, parameters_of
from .noise import make_alphas_cumprod, make_betas

# the noise model: carried over with the other class's defaults
MODEL_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr", "snr_shift_scale", "sigma_data", "sigma_schedule",
    "rho", "use_flow_sigmas", "shift", "flow_shift", "use_dynamic_shifting", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "shift_terminal", "time_shift_type", "invert_sigmas",
)  # fmt: skip
# how the solver goes over it: explicit values only, else the default of the solver's own class
GRID_KEYS = (
    "timestep_spacing", "steps_offset", "final_sigmas_type", "set_alpha_to_one", "lower_order_final",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "lambda_min_clipped", "variance_type", "clip_sample", "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value", "solver_order", "sigma_min", "sigma_max",
)  # fmt: skip
SWAPPED_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddim": {"timestep_spacing": "leading", "clip_sample": True},
}
"""Defaults of diffusers' class of a solver's name, where they are not ``DLMSScheduler``'s."""

# without effect here: other samplers' settings, and what a solver's name says already
WITHOUT_EFFECT = (
    "_class_name", "_diffusers_version", "_use_default_values", "_name_or_path", "skip_prk_steps",
    "original_inference_steps", "timestep_scaling", "eta", "tau_func", "predictor_order",
    "corrector_order", "set_sigma_to_zero", "gamma", "scale_factors", "upscale_mode", "euler_at_final",
)  # fmt: skip
# values with which a key changes nothing; others are refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis", "data_prediction", None),
    "interpolation_type": ("linear", None),
    "stochastic_sampling": (False, None),
    "predict_x0": (True, None),
    "disable_corrector": ([], (), None),
    "solver_p": (None,),
    "timestep_type": ("discrete", None),
    "solver_type": ("midpoint", "bh2", "logrho", None),
    "use_noise_sampler": (True, False, None),
    "noise_sampler_seed": (None,),
}
_OWN_CLASS = {
    "ddim": "DDIM", "unipc": "UniPC", "dpm_solver_pp": "DPMSolverMultistep", "deis": "DEIS",
}  # fmt: skip
_BETAS = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02,
}  # fmt: skip
FLOW_KEYS = ("shift", "base_image_seq_len")
FLOW_GRIDS = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm_solver_pp",
    "DPMSolverSinglestepScheduler": "dpm_solver_pp",
    "SASolverScheduler": "dpm_solver_pp",
    "DEISMultistepScheduler": "deis",
}


def adopt(config: Mapping[str, Any], solver: str | None = None) -> dict[str, Any]:
    """``config`` of a diffusers scheduler as keyword arguments of ours.

    Args:
        solver: the name of the solver it is for; None for a learned one.

    Raises:
        ValueError: a class, key or value whose meaning is not known.
    """
    name = class_of(config)
    defaults = _defaults(config, name, solver)
    _check(config, defaults, name)
    adopted = {k: config[k] for k in MODEL_KEYS if k in config}
    explicit = {k: config[k] for k in GRID_KEYS if k in config and k not in defaults}
    if _is_flow(config):
        adopted |= _flow(config, defaults, name)
        explicit.pop("timestep_spacing", None)
        explicit = {k: v for k, v in explicit.items() if k != "sigma_max" or v is not None}
    elif _is_edm(config):
        adopted |= _edm(config, name)
        explicit = {k: v for k, v in explicit.items() if k not in ("sigma_min", "sigma_max")}
    else:
        adopted = {k: v for k, v in adopted.items() if k not in ("shift", "flow_shift")}
        _check_range(config)
        if (name or "").startswith("CogVideoX"):  # their step has the key and does not clip
            explicit["clip_sample"] = False
        explicit = {**SWAPPED_DEFAULTS.get(solver or "", {}), **explicit}
    adopted |= explicit | _solver_options(config, defaults, solver)
    if adopted.get("flow_grid") in (None, "flow_match"):
        adopted.pop("use_flow_sigmas", None)  # pipelines read it; FlowMatch classes do not have it
    return adopted


def _defaults(config: Mapping[str, Any], name: str | None, solver: str | None) -> set[str]:
    """Keys that were left to their defaults.

    Stable Diffusion's pipelines change ``steps_offset`` and ``clip_sample`` of a scheduler they are
    given, which stay listed as defaults: where the class is the solver's own, its values count.
    """
    listed = set(config.get("_use_default_values", ()))
    if not name or not name.startswith(_OWN_CLASS.get(solver or "", "?")):
        return listed
    parameters = parameters_of(name)
    return {k for k in listed if k not in parameters or config.get(k) == parameters[k]}


# -- kinds of noise models -----------------------------------------------------------------------


def _is_flow(config: Mapping[str, Any]) -> bool:
    """Flow matching: a FlowMatch class, ``use_flow_sigmas``, or a flow prediction."""
    named = str(config.get("_class_name") or "").startswith("FlowMatch")
    shaped = "beta_schedule" not in config and any(key in config for key in FLOW_KEYS)
    chosen = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(named or shaped or chosen)


def _flow(config: Mapping[str, Any], defaults: set[str], name: str | None) -> dict[str, Any]:
    grid = (
        FLOW_GRIDS.get(name or "", "flow_match") if config.get("use_flow_sigmas") else "flow_match"
    )
    highest = config.get("sigma_max")
    if grid == "flow_match" and highest is not None and float(highest) > 1:
        raise ValueError(
            f"sigma_max is {highest}, above a flow's largest noise level, 1: the model's states are "
            "not those of a flow (Cosmos); keep the pipeline's own scheduler"
        )
    adopted: dict[str, Any] = {"flow_grid": grid}
    if "prediction_type" not in config or "prediction_type" in defaults or grid == "flow_match":
        adopted["prediction_type"] = "flow_prediction"
    # the other name's default says nothing
    if "shift" in config and "flow_shift" not in config:
        adopted["flow_shift"] = None
    return adopted


def _is_edm(config: Mapping[str, Any]) -> bool:
    return config.get("sigma_data") is not None or config.get("timestep_type") == "continuous"


def _edm(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    adopted = {k: config[k] for k in ("sigma_min", "sigma_max", "final_sigmas_type") if k in config}
    if config.get("timestep_type") == "continuous":  # noise levels of a unit-variance EDM model
        modified = [k for k in ("karras", "exponential") if config.get(f"use_{k}_sigmas")]
        known = config.get("prediction_type") == "v_prediction" and len(modified) == 1
        if not known or config.get("sigma_min") is None or config.get("sigma_max") is None:
            raise ValueError(
                "timestep_type is 'continuous': supported with prediction_type='v_prediction', "
                "use_karras_sigmas or use_exponential_sigmas, and sigma_min and sigma_max set"
            )
        adopted |= {"sigma_data": 1.0, "sigma_schedule": modified[0]}
        for key in ("use_karras_sigmas", "use_exponential_sigmas"):
            adopted[key] = False
    if (name or "").startswith("Cosine"):
        adopted["sigma_label"] = "atan"
    return adopted


def _check_range(config: Mapping[str, Any]) -> None:
    """A VP grid cannot leave the trained levels: ``sigma_max`` beyond them is another model."""
    highest = config.get("sigma_max")
    if highest is None or not any(
        config.get(f"use_{k}_sigmas") for k in ("karras", "exponential", "beta")
    ):
        return
    model = {**_BETAS, **config}
    last = float(make_alphas_cumprod(model, make_betas(model))[-1])
    level = ((1 - last) / last) ** 0.5
    if float(highest) > level * (1 + 1e-4):
        raise ValueError(
            f"sigma_max is {highest}, above every noise level of the beta schedule, which ends at "
            f"{level:.6g}"
        )


# -- what is refused -----------------------------------------------------------------------------


def _check(config: Mapping[str, Any], defaults: set[str], name: str | None) -> None:
    import diffusers

    if name is not None and name not in READ_CLASSES and hasattr(diffusers, name):
        raise ValueError(
            f"the config is of {name}, whose noise model is not understood here: keep the "
            "pipeline's own scheduler"
        )
    known = {*MODEL_KEYS, *GRID_KEYS, *WITHOUT_EFFECT, *NEUTRAL}
    for key, value in config.items():
        if key not in known and (name not in READ_CLASSES or key not in defaults):
            raise ValueError(
                f"{key} is {value!r}: what it means for the noise levels is not known here; keep "
                "the pipeline's own scheduler, or pass a config without it"
            )
        neutral = NEUTRAL.get(key)
        if neutral is None or key in ("solver_type", "timestep_type") or value in neutral:
            continue
        raise ValueError(f"{key} is {value!r}, supported are {neutral}")
    if config.get("euler_at_final") and config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(  # a last step to zero is first order anyway
            f"euler_at_final is True with final_sigmas_type={config['final_sigmas_type']!r}: "
            "supported with 'zero'"
        )
    if config.get("use_flow_sigmas"):
        kind = config.get("prediction_type")
        if kind not in ("flow_prediction", "sample", None):
            raise ValueError(
                f"prediction_type is {kind!r} together with use_flow_sigmas, supported are "
                "'flow_prediction' and 'sample'"
            )
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            unipc = name == "UniPCMultistepScheduler" and key == "use_karras_sigmas"
            if config.get(key) and not unipc:
                raise ValueError(f"{key} is True together with use_flow_sigmas: not supported")


def _solver_options(
    config: Mapping[str, Any], defaults: set[str], solver: str | None
) -> dict[str, Any]:
    """``solver_type`` as an option of the solver it belongs to."""
    kind = config.get("solver_type")
    if kind is None or "solver_type" in defaults or solver is None:
        return {}
    if solver == "unipc" and kind == "bh1":
        return {"solver_options": {"variant": "bh1"}}
    if solver == "dpm_solver_pp" and kind == "heun":
        if int(config.get("solver_order") or 2) > 2:
            raise ValueError("solver_type is 'heun' with solver_order 3: supported up to order 2")
        return {"solver_options": {"exact": True}}
    if kind not in ("midpoint", "heun", "bh1", "bh2", "logrho"):
        raise ValueError(
            f"solver_type is {kind!r}, expected 'midpoint', 'heun', 'bh1', 'bh2' or 'logrho'"
        )
    return {}

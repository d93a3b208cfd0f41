"""Reading the config of another scheduler class as what that class would have run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLOW_KEYS = ("shift", "base_image_seq_len", "stochastic_sampling")
# FLUX pipelines drop the user's sigmas when a config has this key set
DROPPED = ("use_flow_sigmas", "algorithm_type", "solver_type", "predict_x0", "interpolation_type")
# the other class's defaults: carried over where they describe the model or its grid
CARRIED = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "final_sigmas_type",
    "set_alpha_to_one",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
    "invert_sigmas",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "sigma_schedule",
    "rho",
}


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether another class wrote ``config``: ours always has ``solver``, also after a detour."""
    return "solver" not in config


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of a diffusers scheduler as keyword arguments of ours.

    diffusers drops values that were the other class's defaults; the grid would then silently
    change (DDIM's "leading" would become "linspace"), so those that describe it are kept. Flow
    matching is recognised without any further argument.
    """
    defaults = set(config.get("_use_default_values", ()))
    found = {k: v for k, v in config.items() if k != "_use_default_values"}
    found = {k: v for k, v in found.items() if k not in defaults or k in CARRIED}
    if is_flow(config):
        found["prediction_type"] = "flow_prediction"
        for key in ("beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing"):
            if key in defaults:
                found.pop(key, None)
        # the other name's default says nothing
        if "shift" in config and "flow_shift" not in config:
            found.pop("flow_shift", None)
    else:
        found.pop("flow_shift", None)
    for key in DROPPED:
        found.pop(key, None)
    return found


def is_flow(config: Mapping[str, Any]) -> bool:
    """Flow matching: a FlowMatch class, ``use_flow_sigmas``, or a flow prediction."""
    named = str(config.get("_class_name") or "").startswith("FlowMatch")
    shaped = "beta_schedule" not in config and any(key in config for key in FLOW_KEYS)
    chosen = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(named or shaped or chosen)

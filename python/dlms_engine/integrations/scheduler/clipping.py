"""Whether a config clips the data prediction, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def clips(config: Mapping[str, Any]) -> bool:
    """Whether the data prediction is clipped or thresholded in every step."""
    return bool(config["clip_sample"] or config["thresholding"])


def clipped(data: Tensor, config: Mapping[str, Any]) -> Tensor:
    """``data`` ``[B, ...]`` within fixed bounds, or dynamically thresholded (Saharia et al. 2022)."""
    if not config["thresholding"]:
        bound = float(config["clip_sample_range"])
        return data.clamp(-bound, bound)
    flat = data.flatten(1)
    ratio = float(config["dynamic_thresholding_ratio"])
    bounds = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True)
    bounds = bounds.clamp(1.0, float(config["sample_max_value"]))
    return (flat.clamp(-bounds, bounds) / bounds).reshape(data.shape)

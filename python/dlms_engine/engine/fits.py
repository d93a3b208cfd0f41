"""Whether a policy can run on a denoiser."""

from __future__ import annotations

import torch

from ..models.denoiser import Denoiser
from ..processes.base import config_summary
from ..solvers.policy import Policy


def check_fit(denoiser: Denoiser, policy: Policy, dtype: torch.dtype) -> None:
    """Refuses what ``Sampler`` cannot run with a state of ``dtype``.

    Raises:
        ValueError: as ``Sampler``.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float64 (state)")
    network_dtype = denoiser.network_dtype
    if dtype == torch.float64 and network_dtype not in (None, torch.float64):
        raise ValueError(
            f"dtype is {dtype}, but the network's parameters are {network_dtype}: a float64 state "
            "needs a float64 network (network.double()); float32 is the usual state"
        )
    if policy.needs_features and not denoiser.features:
        raise ValueError(
            "the solver computes its rows from the network's features, but the denoiser taps none: "
            "Denoiser(..., features='mid_block'), with the module it was distilled with"
        )
    if policy.process.config() != denoiser.process.config():
        raise ValueError(
            f"the solver was made for {config_summary(policy.process.config())}; the denoiser "
            f"runs {config_summary(denoiser.process.config())}: make or distil the solver on the "
            "denoiser's process"
        )

"""Stand-in of ComfyUI's public interface, as much as custom nodes use of it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor


class CONST:
    """Stand-in of ComfyUI's flow parameterisation."""


class FlowSampling(CONST):
    sigma_min, sigma_max = 0.001, 1.0

    def percent_to_sigma(self, percent: float) -> float:
        return 3 * (1 - percent) / (1 + 2 * (1 - percent))


class EpsSampling:
    sigma_min, sigma_max = 0.0292, 14.6146


class KSampler:
    """Stand-in of ``comfy.samplers.KSAMPLER``: holds a function and calls it as ComfyUI does."""

    def __init__(self, sampler_function: Any, extra_options: dict[str, Any]) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options

    def sample(self, model_wrap: Any, sigmas: Tensor, noise: Tensor, callback: Any) -> Tensor:
        def model_k(
            x: Tensor, sigma: Tensor, model_options: Any = None, seed: Any = None
        ) -> Tensor:
            return model_wrap(x, sigma)

        model_k.inner_model = model_wrap
        return self.sampler_function(
            model_k,
            noise,
            sigmas,
            extra_args={"model_options": {}, "seed": 1},
            callback=lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1),
            disable=True,
            **self.extra_options,
        )


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts ``comfy.samplers`` and ``comfy.k_diffusion.sampling`` where imports find them."""
    samplers = ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSampler
    samplers.KSAMPLER_NAMES = ["euler"]
    samplers.SAMPLER_NAMES = ["euler", "ddim"]
    samplers.KSampler = SimpleNamespace(SAMPLERS=samplers.SAMPLER_NAMES)
    sampling = ModuleType("comfy.k_diffusion.sampling")
    folder = ModuleType("comfy.k_diffusion")
    folder.sampling = sampling
    package = ModuleType("comfy")
    package.samplers, package.k_diffusion = samplers, folder
    monkeypatch.setitem(sys.modules, "comfy.k_diffusion", folder)
    monkeypatch.setitem(sys.modules, "comfy.k_diffusion.sampling", sampling)
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


class Model:
    """Stand-in of a ComfyUI MODEL around an exact denoiser."""

    def __init__(self, sampling: Any, denoise: Any) -> None:
        self.model_sampling = sampling
        self.inner_model = SimpleNamespace(model_sampling=sampling)
        self._denoise = denoise

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self._denoise(x, sigma)

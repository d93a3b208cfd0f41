"""The two nodes. ComfyUI is imported where it is used: the module loads without it."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlms_engine.integrations.k_diffusion import get_sigmas_dlms, sample_dlms, samples_a_flow
from dlms_engine.integrations.scheduler.source import load_source
from dlms_engine.solvers import SOLVERS

CATEGORY = "sampling/custom_sampling"


class SolverFile:
    """What both nodes do about ``solver_file``: notice a new file, refuse a bad one when loaded."""

    @classmethod
    def IS_CHANGED(cls, solver_file: str | None = "", **_: Any) -> str:
        """ComfyUI runs the node again when this changes: path, size and time of the file.

        Of a path that comes from another node ComfyUI gives None: the file is read when the node runs.
        """
        path = (solver_file or "").strip()
        if not path or not os.path.isfile(path):
            return path
        status = os.stat(path)
        return f"{path} {status.st_size} {status.st_mtime_ns}"

    @classmethod
    def VALIDATE_INPUTS(cls, solver_file: str | None = "") -> bool | str:
        """True, or what is wrong with ``solver_file``, before anything runs."""
        if not (solver_file or "").strip():
            return True
        assert solver_file is not None
        try:
            load_source(solver_file.strip())
        except (OSError, ValueError) as exc:
            return f"solver_file: {exc}"
        return True


class DLMSSampler(SolverFile):
    """Gives a SAMPLER that runs a handcrafted solver or a solver file."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY: ClassVar[str] = f"{CATEGORY}/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "solver": (sorted(SOLVERS), {"default": "dpm_solver_pp"}),
                "order": ("INT", {"default": 2, "min": 1, "max": 4}),
            },
            "optional": {"solver_file": ("STRING", {"default": ""})},
        }

    def get_sampler(self, solver: str, order: int, solver_file: str = "") -> tuple[Any]:
        """``solver_file`` (a path) goes before ``solver``; ``order`` is at most the solver's."""
        import comfy.samplers

        chosen = solver_file.strip() or solver
        options: dict[str, Any] = {"solver": chosen}
        if not solver_file.strip():
            highest = 3 if solver in ("dpm_solver_pp", "unipc") else 4
            options["solver_order"] = min(order, highest)
        return (comfy.samplers.KSAMPLER(sample_dlms, options),)


class DLMSSigmas(SolverFile):
    """Gives SIGMAS: a schedule over the model's range, or those of a solver file."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"
    CATEGORY: ClassVar[str] = f"{CATEGORY}/schedulers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 6, "min": 1, "max": 1000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            },
            "optional": {"solver_file": ("STRING", {"default": ""})},
        }

    def get_sigmas(
        self, model: Any, steps: int, denoise: float, solver_file: str = ""
    ) -> tuple[Tensor]:
        """``[steps + 1]`` on the CPU; with ``denoise`` < 1 the end of a longer schedule.

        Flow models get their own (shifted) levels at uniform times, others a Karras schedule.
        """
        if denoise <= 0:
            return (torch.FloatTensor([]),)
        sampling = model.get_model_object("model_sampling")
        total = steps if denoise >= 1 else int(steps / denoise)
        if solver_file.strip():
            sigmas = get_sigmas_dlms(solver=solver_file.strip())
            keep = len(sigmas) - 1 if denoise >= 1 else max(round((len(sigmas) - 1) * denoise), 1)
            return (sigmas[-(keep + 1) :],)
        if samples_a_flow(_Holder(sampling)):
            levels = [float(sampling.percent_to_sigma(i / total)) for i in range(total)]
            sigmas = torch.tensor([*levels, 0.0])
        else:
            sigmas = get_sigmas_dlms(total, float(sampling.sigma_min), float(sampling.sigma_max))
        return (sigmas[-(steps + 1) :],)


class _Holder:
    def __init__(self, model_sampling: Any) -> None:
        self.model_sampling = model_sampling

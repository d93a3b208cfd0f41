"""A pipeline's network as a denoiser: its prompts, its guidance and its time unit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...models.denoiser import Denoiser
from ...processes.base import config_summary
from ...support.files import replacing
from ..diffusers import DLMSScheduler
from ..scheduler.noise import NoiseModel
from .parts import scheduler_of, set_scheduler
from .prompt_calls import prompt_calls
from .prompt_network import PipelineNetwork
from .proof import proved
from .step_calls import StepCalls

_log = logging.getLogger("dlms_engine")


class PipelineDenoiser(Denoiser):
    """A ``Denoiser`` whose samples have numbers, and whose exact solutions can be kept in a folder."""

    folder: Path | None = None
    holds_branches = True  # its prompts and the negative ones

    def first_sample(self, number: int) -> None:
        """Tells which training sample the next batches begin with; learners call it."""
        self.network.first = number

    @property
    def next_sample(self) -> int:
        """What ``first_sample`` was told."""
        return int(self.network.first)

    def kept_solution(self, noise: Tensor, steps: int, solve: Callable[[], Tensor]) -> Tensor:
        """``solve()`` for start noise ``[B, ...]``, or what it gave in an earlier run.

        A file is used if start noise, prompts, guidance and weights are those it was made with, and the
        network's answers: adapters' scales and FreeU are no weights.
        """
        if self.folder is None:
            return solve()
        self.folder.mkdir(parents=True, exist_ok=True)
        key, answers = self._key(noise, steps), self._answers(noise)
        path = self.folder / f"latents-{key[:16]}.safetensors"
        if path.exists():
            try:
                kept = load_file(path)
                if self._same(kept["answers"], answers):
                    return kept["exact"].to(noise)
                _log.info("%s is of a network that answers otherwise: made anew", path)
            except (OSError, KeyError, safetensors.SafetensorError) as exc:
                _log.warning("%s cannot be read (%s): made anew", path, exc)
        exact = solve()
        tensors = {"noise": noise.contiguous(), "exact": exact.contiguous(), "answers": answers}
        with replacing(path) as partial:
            save_file(tensors, partial)
        return exact

    @torch.no_grad()
    def _answers(self, noise: Tensor) -> Tensor:
        """``[N]`` float32 on the CPU: outputs for the first sample, early and late in a run."""
        high = torch.tensor(self.process.t_max, dtype=torch.float64)
        x = noise[:1] / self.process.sigma(high).clamp(min=1).to(noise)
        x = x.to(self.network_dtype or x.dtype)
        first, self.network.first = self.network.first, 0
        try:
            outputs = [self.network_output(x, self._noise_level(t)) for t in (high, high / 4)]
        finally:
            self.network.first = first
        branches = [
            b for output in outputs for b in (output if isinstance(output, tuple) else [output])
        ]
        return torch.cat([branch.float().reshape(-1).cpu() for branch in branches])

    def _same(self, kept: Tensor, answers: Tensor) -> bool:
        """Whether two answers differ by no more than another device's rounding."""
        reach = max(1e-3, 2 * torch.finfo(self.network_dtype or torch.float32).eps)
        if kept.shape != answers.shape:
            return False
        return bool((kept - answers).norm() <= reach * answers.norm())

    def _key(self, noise: Tensor, steps: int) -> str:
        """Changes with everything the exact solution depends on (16 values of each parameter)."""
        network = self.network
        told = [noise, *network.conditions()]
        told += [p.detach().reshape(-1)[:16] for p in network.parameters()]
        call = network.call
        model = f"{steps} {self.guidance_scale} {call.guidance_2} {call.boundary}"
        model += f" {config_summary(self.process.config())} {self.prediction} {self.sigma_data}"
        model += f" {call.guidance} {[one.weights for one in call.calls]}"
        total = hashlib.sha256(model.encode())
        for tensor in told:
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


def pipeline_denoiser(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    guidance_scale: float | None = None,
    features: str | None = None,
    folder: str | Path | None = None,
    **arguments: Any,
) -> tuple[PipelineDenoiser, tuple[int, ...]]:
    """A denoiser of ``pipe``'s network with prompts and guidance, and one sample's shape.

    Args:
        pipe: a loaded diffusers pipeline; two networks that are switched by time (Wan 2.2) are one
            network here.
        prompts: encoded once, by the pipeline itself; None for unconditional pipelines, or with
            ``prompt_embeds`` among the arguments.
        guidance_scale: None leaves the pipeline's default.
        features: bottleneck module, for solvers that read it.
        folder: keeps the prompts' embeddings and the exact solutions of the validation.
        arguments: for the pipeline's call (``height``, ``width``, ``negative_prompt``, ...).
    """
    asked = {"num_inference_steps": 2, **arguments}
    if guidance_scale is not None:
        asked["guidance_scale"] = guidance_scale
    original = scheduler_of(pipe)
    model = DLMSScheduler.from_config(original.config, solver="ddim").noise_model

    def prove(call: StepCalls, given: dict[str, Any]) -> None:
        proved(pipe, _denoiser(pipe, call, model, None), given)

    set_scheduler(pipe, DLMSScheduler.from_config(original.config, solver="ddim"))
    try:
        call = prompt_calls(pipe, prompts, asked, folder, prove)
    finally:
        set_scheduler(pipe, original)
    denoiser = _denoiser(pipe, call, model, features)
    denoiser.folder = None if folder is None else Path(folder)
    return denoiser, call.shape


def _denoiser(
    pipe: Any, call: StepCalls, model: NoiseModel, features: str | None
) -> PipelineDenoiser:
    return PipelineDenoiser(
        PipelineNetwork({one.module: getattr(pipe, one.module) for one in call.calls}, call),
        model.process,
        model.denoiser.prediction,
        sigma_data=model.denoiser.sigma_data,
        features=features,
        guidance_scale=call.guidance if call.fused else None,
        time_input=model.timestep,
    )

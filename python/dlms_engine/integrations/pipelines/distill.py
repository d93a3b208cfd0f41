"""Distilling a solver for one diffusers checkpoint, on its own prompts and guidance.

from dlms_engine.integrations.pipelines.distill import distill_pipeline

scheduler = distill_pipeline("path/to/pipeline", prompts="prompts.txt", nfe=5, guidance_scale=7.5)
scheduler.save_pretrained("solver")        # JSON, and the solver as safetensors beside it
pipe.scheduler = scheduler

On the command line: ``dlms distill --pipeline PATH --prompts prompts.txt --guidance-scale 7.5``.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...learners import distill
from ...learners.registry import learner
from ...models.denoiser import Denoiser, find_module
from ...models.tap import FeatureTap
from ...support.files import replacing
from ...support.parallel import World
from ..diffusers import DLMSScheduler
from ..scheduler.origin import ORIGIN, pipeline_facts
from ..scheduler.probe import ProbeLoop, first_argument
from .prompt_calls import NetworkCall, is_batched, network_of, prompt_calls

_log = logging.getLogger("dlms_engine")
FEATURES = 64  # length of the bottleneck vector the learned designers read


class PipelineNetwork(nn.Module):
    """A pipeline's network with its prompts built in: sample i of a batch has prompt i mod P.

    Args:
        network: the pipeline's.
        call: arguments of one call of the network for all prompts.

    Attributes:
        call: what it was made with.
        first: number of the batch's first sample, so that training goes through all prompts.

    Samples come on the network's device; the remembered arguments are moved there once.
    """

    def __init__(self, network: nn.Module, call: NetworkCall) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self._loop = ProbeLoop(network)
        self._loop.call = call.args, call.kwargs
        self._prompts, self._branches = call.prompts, call.branches
        self._batched = _batched(call)
        self._shared = {k: v for k, v in self._loop.tensors().items() if k not in self._batched}
        self.first = 0

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        """``x`` ``[branches * B, ...]``, ``time`` ``[branches * B]`` in the network's unit."""
        batch = x.shape[0] // self._branches
        device = x.device
        self._place(device)
        rows = (torch.arange(batch, device=device) + self.first) % self._prompts
        rows = torch.cat([rows + self._prompts * k for k in range(self._branches)])
        chosen = {k: v[rows] for k, v in self._batched.items()}
        chosen |= self._shared
        out = self._loop.evaluate(x, time, chosen)
        return out[:, : x.shape[1]] if out.ndim == 4 else out

    def _place(self, device: torch.device) -> None:
        """The arguments on ``device``, where they are not."""
        for kept in (self._batched, self._shared):
            for name, value in kept.items():
                if value.device != device:
                    kept[name] = value.to(device)


def _batched(call: NetworkCall) -> dict[str, Tensor]:
    """The remembered arguments that have one row per sample."""
    names = ("sample", "hidden_states", "timestep", "timesteps")
    rest = {k: v for k, v in call.kwargs.items() if k not in names}
    found = pytree.tree_flatten_with_path((call.args[2:], rest))[0]
    return {
        f"argument{i}": leaf
        for i, (path, leaf) in enumerate(found)
        if is_batched(str(path), leaf, call.prompts * call.branches)
    }


class PipelineDenoiser(Denoiser):
    """A ``Denoiser`` whose samples have numbers, and whose exact solutions can be kept in a folder."""

    folder: Path | None = None

    def first_sample(self, number: int) -> None:
        """Tells which training sample the next batches begin with; learners call it."""
        self.network.first = number

    def kept_solution(self, noise: Tensor, steps: int, solve: Callable[[], Tensor]) -> Tensor:
        """``solve()`` for start noise ``[B, ...]``, or what it gave in an earlier run.

        A file is used if start noise, prompts, guidance and weights are those it was made with.
        """
        if self.folder is None:
            return solve()
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self._key(noise, steps)
        path = self.folder / f"latents-{key[:16]}.safetensors"
        if path.exists():
            try:
                return load_file(path)["exact"].to(noise)
            except (OSError, KeyError, safetensors.SafetensorError) as exc:
                _log.warning("%s cannot be read (%s): made anew", path, exc)
        exact = solve()
        with replacing(path) as partial:
            save_file({"noise": noise.contiguous(), "exact": exact.contiguous()}, partial)
        return exact

    def _key(self, noise: Tensor, steps: int) -> str:
        """Changes with everything the exact solution depends on (16 values of each parameter)."""
        told = [noise, *self.network._batched.values()]
        told += [p.detach().reshape(-1)[:16] for p in self.network.parameters()]
        total = hashlib.sha256(f"{steps} {self.guidance_scale} {self.process!r}".encode())
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
        pipe: a loaded diffusers pipeline (SD, SDXL, SD3, FLUX, unconditional).
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
    original = pipe.scheduler
    scheduler = DLMSScheduler.from_config(original.config, solver="ddim")
    pipe.scheduler = scheduler
    try:
        call = prompt_calls(pipe, prompts, asked, folder)
    finally:
        pipe.scheduler = original
    network = PipelineNetwork(network_of(pipe), call)
    model = DLMSScheduler.from_config(original.config).noise_model
    if model.sign < 0:
        raise ValueError(
            f"{type(pipe).__name__}: networks that predict the negative (EDM v-prediction, inverted "
            "flows) run handcrafted solvers only; distilling for them is not supported"
        )
    scale = network._loop.time_scale(call.timestep, model.levels)
    guided = call.branches == 2
    denoiser = PipelineDenoiser(
        network,
        model.process,
        model.denoiser.prediction,
        features=features,
        guidance_scale=call.guidance,
        unconditional={"guided": torch.ones(1)} if guided else None,
        time_input=lambda t: model.timestep(t) * scale,
    )
    denoiser.folder = None if folder is None else Path(folder)
    return denoiser, tuple(first_argument(call.args, call.kwargs).shape[1:])


def distill_pipeline(
    pipeline: Any,
    prompts: str | Path | Sequence[str] | None = None,
    *,
    nfe: int = 5,
    guidance_scale: float | None = None,
    method: str = "dlms",
    trajectories: int | None = None,
    output: str | Path | None = None,
    features: str | None = "mid_block",
    folder: str | Path | None = None,
    pipeline_arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> DLMSScheduler:
    """Distils a solver for a pipeline; returns the scheduler that runs it there.

    Args:
        pipeline: a loaded pipeline, or what ``load_pipeline`` takes.
        prompts: a file with one prompt a line, or the prompts; None for unconditional models.
        nfe: network evaluations (a guided one counts once).
        guidance_scale: None takes the pipeline's default.
        method: one of ``dlms_engine.learners.LEARNERS``.
        output: where the solver file goes as well.
        features: bottleneck for DLMS; a network without it, or with one that is not 8 x 8, gets
            the variant that does not read it. Pipelines that do not call ``scale_model_input`` (SD3,
            FLUX, DDPM) get the one without an analytical first step, unless ``afs`` is given.
        folder: keeps the prompts' embeddings and exact latents, for a later or resumed run.
        pipeline_arguments: for the pipeline's call (``height``, ``width``, ``prompt_embeds``, ...).
        settings: of the method.

    Raises:
        ValueError: no prompts in the file, unknown method or setting.
    """
    pipe = load_pipeline(pipeline)
    texts = _texts(prompts)
    denoiser, shape = pipeline_denoiser(
        pipe, texts, guidance_scale=guidance_scale, folder=folder, **(pipeline_arguments or {})
    )
    if method == "dlms" and not _attach(denoiser, features, shape):
        settings.setdefault("bottleneck", False)
    if learner(method).afs and not denoiser.network.call.scaled:
        settings.setdefault("afs", False)  # the pipeline could not run it step by step
    if method == "gits" and not denoiser.network.call.scaled:
        settings.setdefault("candidates", "searched")  # nor a standard grid with it
    solver = distill(
        denoiser, method, nfe=nfe, shape=shape, trajectories=trajectories, output=output, **settings
    )
    scale = _stated_scale(
        pipe, denoiser, {"guidance_scale": guidance_scale, **(pipeline_arguments or {})}
    )
    solver.settings[ORIGIN] = pipeline_facts(pipe, shape, scale, nfe)
    if output is not None and World.current().rank == 0:
        solver.save(output)
    return cast(DLMSScheduler, DLMSScheduler.from_config(pipe.scheduler.config, solver=solver))


def _stated_scale(pipe: Any, denoiser: PipelineDenoiser, arguments: dict[str, Any]) -> float | None:
    """The guidance scale of the distillation: measured, as asked for, or the pipeline's default."""
    scale = denoiser.guidance_scale
    if scale is None:
        scale = arguments.get("guidance_scale")
    if scale is None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        scale = getattr(parameters.get("guidance_scale"), "default", None)
    return float(scale) if isinstance(scale, (int, float)) else None


def load_pipeline(pipeline: Any, dtype: torch.dtype | None = None) -> Any:
    """A pipeline from its directory, or from the hub (``owner/name``, as diffusers does).

    ``dtype`` is that of its weights, where it is loaded here.

    Raises:
        ValueError: neither a directory nor of that form, or not to be had.
    """
    if not isinstance(pipeline, (str, Path)):
        return pipeline
    name = os.fspath(pipeline)
    folder = os.path.isdir(name)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(f"{name} is not a directory of a diffusers pipeline, nor owner/name")
    if folder and not os.path.isfile(os.path.join(name, "model_index.json")):
        raise ValueError(f"{name} has no model_index.json: it is not a diffusers pipeline")
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, local_files_only=folder, torch_dtype=dtype)
    except (OSError, ValueError) as exc:
        raise ValueError(f"the pipeline {name} cannot be loaded: {exc}") from exc


def _texts(prompts: str | Path | Sequence[str] | None) -> list[str] | None:
    if prompts is None:
        return None
    if isinstance(prompts, (str, Path)):
        prompts = Path(prompts).read_text(encoding="utf-8-sig").splitlines()
    texts = [line.strip() for line in prompts if line.strip()]
    if not texts:
        raise ValueError("prompts are empty, expected at least one line")
    return texts


def _attach(denoiser: Denoiser, features: str | None, shape: tuple[int, ...]) -> bool:
    """Taps ``features`` if the network has it with the length the designers read."""
    if features is None:
        return False
    try:
        module = find_module(denoiser.network, features)
    except ValueError as exc:
        _log.warning("every sample gets the same rows: no bottleneck is read: %s", exc)
        return False
    tap = FeatureTap()
    handle = module.register_forward_hook(tap)
    with torch.no_grad():
        zeros = torch.zeros(1, *shape, device=denoiser.device)
        denoiser(zeros, denoiser.process.t_max)
    handle.remove()
    raw = tap.value
    length = 0 if raw is None else raw.mean(dim=1).numel() // raw.shape[0]
    if length != FEATURES:
        _log.warning(
            "every sample gets the same rows: the bottleneck %s has %d places, 8 x 8 are read",
            features,
            length,
        )
        return False
    denoiser.features = features
    module.register_forward_hook(denoiser._tap)
    return True

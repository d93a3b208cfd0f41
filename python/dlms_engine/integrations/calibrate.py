"""Distilling a solver for one diffusers checkpoint, on its own prompts and guidance.

from dlms_engine.integrations.calibrate import distill_pipeline

scheduler = distill_pipeline("path/to/pipeline", prompts="prompts.txt", nfe=5, guidance_scale=7.5)
scheduler.save_pretrained("solver")        # JSON, and the solver as safetensors beside it
pipe.scheduler = scheduler
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..denoiser import Denoiser, FeatureTap, find_module
from ..learners import distill
from .diffusers import DLMSScheduler
from .schedule.probe import Loop, first_argument

log = logging.getLogger("dlms_engine")
FEATURES = 64  # length of the bottleneck vector the learned designers read
WITHOUT_BATCH = ("txt_ids", "img_ids", "image_rotary_emb")


class _CapturedError(Exception):
    """Ends the pipeline's call at its first network evaluation."""


class _Capture(Loop):
    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.call = args, kwargs
        raise _CapturedError


class PipelineNetwork(nn.Module):
    """A pipeline's network with its prompts built in: sample i of a batch has prompt i mod P.

    Args:
        loop: holds the arguments of one call of the network for all prompts.
        prompts: P.
        branches: 2 with classifier-free guidance, unconditional half first; else 1.
    """

    def __init__(self, loop: Loop, prompts: int, branches: int) -> None:
        super().__init__()
        self.network = loop.network
        self._loop = loop
        self._prompts, self._branches = prompts, branches
        self._batched = _batched(loop, prompts * branches)

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> Tensor:
        """``x`` ``[branches * B, ...]``, ``time`` ``[branches * B]`` in the network's unit."""
        batch = x.shape[0] // self._branches
        rows = torch.arange(batch, device=x.device) % self._prompts
        rows = torch.cat([rows + self._prompts * k for k in range(self._branches)])
        chosen = {name: tensor[rows.to(tensor.device)] for name, tensor in self._batched.items()}
        out = self._loop.evaluate(x, time, chosen)
        return out[:, : x.shape[1]] if out.ndim == 4 else out


def _batched(loop: Loop, count: int) -> dict[str, Tensor]:
    """The remembered arguments that have one row per sample."""
    assert loop.call is not None
    args, kwargs = loop.call
    names = ("sample", "hidden_states", "timestep", "timesteps")
    rest = {k: v for k, v in kwargs.items() if k not in names}
    found = pytree.tree_flatten_with_path((args[2:], rest))[0]
    return {
        f"argument{i}": leaf
        for i, (path, leaf) in enumerate(found)
        if isinstance(leaf, Tensor)
        and leaf.ndim
        and leaf.shape[0] == count
        and not any(name in str(path) for name in WITHOUT_BATCH)
    }


def capture(pipe: Any, prompts: Sequence[str] | None, arguments: dict[str, Any]) -> Loop:
    """Runs ``pipe`` up to its first network call and keeps that call's arguments.

    Raises:
        RuntimeError: the pipeline ended without calling its network.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer")
    loop = _Capture(network)
    loop.install()
    asked = dict(arguments)
    if prompts is not None:
        asked["prompt"] = list(prompts)
    try:
        with torch.no_grad():
            pipe(**asked)
    except _CapturedError:
        return loop
    finally:
        loop.uninstall()
    raise RuntimeError(f"{type(pipe).__name__} did not call its network")


def pipeline_denoiser(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    guidance_scale: float | None = None,
    features: str | None = None,
    **arguments: Any,
) -> tuple[Denoiser, tuple[int, ...]]:
    """A denoiser of ``pipe``'s network with prompts and guidance, and one sample's shape.

    Args:
        pipe: a loaded diffusers pipeline (SD, SDXL, SD3, FLUX, unconditional).
        prompts: encoded once, by the pipeline itself; None for unconditional pipelines, or with
            ``prompt_embeds`` among the arguments.
        guidance_scale: None leaves the pipeline's default.
        features: bottleneck module, for solvers that read it.
        arguments: for the pipeline's call (``height``, ``width``, ``negative_prompt``, ...).
    """
    asked = {"num_inference_steps": 2, **arguments}
    if guidance_scale is not None:
        asked["guidance_scale"] = guidance_scale
    original = pipe.scheduler
    scheduler = DLMSScheduler.from_config(original.config, solver="ddim")
    pipe.scheduler = scheduler
    try:
        loop = capture(pipe, prompts, asked)
    finally:
        pipe.scheduler = original
    assert loop.call is not None
    sample = first_argument(*loop.call)
    guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
    branches = 2 if guided else 1
    model = scheduler.noise_model
    scale = loop.time_scale(scheduler.timesteps.tolist()[0], model.levels)
    network = PipelineNetwork(loop, sample.shape[0] // branches, branches)
    denoiser = Denoiser(
        network,
        model.process,
        model.denoiser.prediction,
        features=features,
        guidance_scale=float(pipe.guidance_scale) if guided else None,
        unconditional={"guided": torch.ones(1)} if guided else None,
        time_input=lambda t: model.timestep(t) * scale,
    )
    return denoiser, tuple(sample.shape[1:])


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
    pipeline_arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> DLMSScheduler:
    """Distils a solver for a pipeline; returns the scheduler that runs it there.

    Args:
        pipeline: a loaded pipeline, or the directory of one (nothing is downloaded).
        prompts: a file with one prompt a line, or the prompts; None for unconditional models.
        nfe: network evaluations (a guided one counts once).
        guidance_scale: None takes the pipeline's default.
        method: one of ``dlms_engine.learners.METHODS``.
        output: where the solver file goes as well.
        features: bottleneck for DLMS; a network without it, or with one that is not 8 x 8, gets
            the variant that does not read it.
        pipeline_arguments: for the pipeline's call (``height``, ``width``, ``prompt_embeds``, ...).
        settings: of the method.

    Raises:
        ValueError: no prompts in the file, unknown method or setting.
    """
    pipe = _load(pipeline)
    texts = _texts(prompts)
    arguments = pipeline_arguments or {}
    usable = _usable(pipe, texts, guidance_scale, features, arguments) if method == "dlms" else None
    denoiser, shape = pipeline_denoiser(
        pipe, texts, guidance_scale=guidance_scale, features=usable, **arguments
    )
    if method == "dlms" and usable is None:
        settings.setdefault("bottleneck", False)
    solver = distill(
        denoiser, method, nfe=nfe, shape=shape, trajectories=trajectories, output=output, **settings
    )
    return cast(DLMSScheduler, DLMSScheduler.from_config(pipe.scheduler.config, solver=solver))


def _load(pipeline: Any) -> Any:
    if not isinstance(pipeline, (str, Path)):
        return pipeline
    if not Path(pipeline).is_dir():
        raise ValueError(f"{pipeline} is not a directory: download the pipeline first")
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(pipeline), local_files_only=True)


def _texts(prompts: str | Path | Sequence[str] | None) -> list[str] | None:
    if prompts is None:
        return None
    if isinstance(prompts, (str, Path)):
        prompts = Path(prompts).read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in prompts if line.strip()]
    if not texts:
        raise ValueError("prompts are empty, expected at least one line")
    return texts


def _usable(
    pipe: Any,
    texts: list[str] | None,
    guidance_scale: float | None,
    features: str | None,
    arguments: dict[str, Any],
) -> str | None:
    """``features`` if the network has that module and its bottleneck has the designers' length."""
    if features is None:
        return None
    denoiser, shape = pipeline_denoiser(pipe, texts, guidance_scale=guidance_scale, **arguments)
    try:
        module = find_module(denoiser.network, features)
    except ValueError as exc:
        log.info("the solver will not read a bottleneck: %s", exc)
        return None
    tap = FeatureTap()
    handle = module.register_forward_hook(tap)
    with torch.no_grad():
        denoiser(torch.zeros(1, *shape), denoiser.process.t_max)
    handle.remove()
    raw = tap.value
    length = 0 if raw is None else raw.mean(dim=1).numel() // raw.shape[0]
    if length != FEATURES:
        log.info("bottleneck of length %d, designers read %d: not used", length, FEATURES)
        return None
    return features

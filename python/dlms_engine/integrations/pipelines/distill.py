"""Distilling a solver for one diffusers checkpoint, on its own prompts and guidance.

from dlms_engine.integrations.pipelines.distill import distill_pipeline

scheduler = distill_pipeline("path/to/pipeline", prompts="prompts.txt", nfe=5, guidance_scale=7.5)
scheduler.save_pretrained("solver")        # JSON, and the solver as safetensors beside it
pipe.scheduler = scheduler

On the command line: ``dlms distill --pipeline PATH --prompts prompts.txt --guidance-scale 7.5``.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ...learners import distill
from ...learners.auto import AutoSettings, effort_of, search_again, search_limit
from ...learners.auto.budget import parse_budget
from ...learners.registry import learner
from ...learners.start import Contest, SamplingProblem, seconds_of_one, start_effort
from ...models.denoiser import Denoiser, find_module
from ...models.tap import FeatureTap
from ...support.files import read_text
from ...support.parallel import World
from ..diffusers import DLMSScheduler
from ..scheduler.origin import ORIGIN, pipeline_facts
from .denoiser import PipelineDenoiser, pipeline_denoiser

__all__ = ["distill_pipeline", "load_pipeline", "pipeline_denoiser"]

_log = logging.getLogger("dlms_engine")
MOST_PROMPTS = 64 << 20  # bytes of a file of prompts
FEATURES = 64  # length of the bottleneck vector the learned designers read


def distill_pipeline(
    pipeline: Any,
    prompts: str | Path | Sequence[str] | None = None,
    *,
    nfe: int = 5,
    guidance_scale: float | None = None,
    method: str = "auto",
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
        method: one of ``dlms_engine.learners.LEARNERS``; ``"auto"`` says first how many evaluations
            its ``budget`` holds here.
        output: where the solver file goes as well.
        features: bottleneck for DLMS and AMED; a network without it, or with one that is not 8 x 8, gets
            the variant that does not read it. Pipelines that do not call ``scale_model_input`` (SD3,
            FLUX, DDPM) get solvers without an analytical first step, unless ``afs`` is given.
        folder: keeps the prompts' embeddings and exact latents, for a later or resumed run.
        pipeline_arguments: for the pipeline's call (``height``, ``width``, ``prompt_embeds``, ...).
        settings: of the method.

    Raises:
        ValueError: no prompts in the file, unknown method or setting.
    """
    pipe = load_pipeline(pipeline)
    texts = _texts(prompts)
    arguments = dict(pipeline_arguments or {})
    among = arguments.pop("guidance_scale", None)
    guidance_scale = among if guidance_scale is None else guidance_scale
    denoiser, shape = pipeline_denoiser(
        pipe, texts, guidance_scale=guidance_scale, folder=folder, **arguments
    )
    if method in ("dlms", "amed") and not _attach(denoiser, features, shape):
        settings.setdefault("bottleneck", False)
    if learner(method).afs and not denoiser.network.call.scaled:
        settings.setdefault("afs", False)  # the pipeline could not run it step by step
    if method == "gits" and not denoiser.network.call.scaled:
        settings.setdefault("candidates", "searched")  # nor a standard grid with it
    if method == "auto" and settings.get("progress", True) and World.current().rank == 0:
        known = {k: settings[k] for k in ("budget", "effort") if k in settings}
        print(budget_line(denoiser, shape, AutoSettings(nfe, **known)), flush=True)
    solver = distill(
        denoiser, method, nfe=nfe, shape=shape, trajectories=trajectories, output=output, **settings
    )
    scale = _stated_scale(pipe, denoiser, {"guidance_scale": guidance_scale, **arguments})
    call = denoiser.network.call
    solver.settings[ORIGIN] = pipeline_facts(
        pipe, shape, scale, nfe, call.guidance_2, call.own_times
    )
    if output is not None and World.current().rank == 0:
        solver.save(output)
    return cast(DLMSScheduler, DLMSScheduler.from_config(pipe.scheduler.config, solver=solver))


def budget_line(denoiser: Denoiser, shape: tuple[int, ...], settings: AutoSettings) -> str:
    """What the budget holds in evaluations of this network, and what measuring the start takes."""
    with torch.no_grad():
        seconds = seconds_of_one(SamplingProblem(denoiser, shape))
    effort = effort_of(settings) or start_effort(seconds)
    most = search_limit(settings, lambda: seconds)
    again = search_again(settings, most)
    contest = Contest(denoiser.process, settings.nfe, effort, most=most, again=again)
    start, whole = contest.cost, contest.cost + round(contest.more)
    limit = parse_budget(settings.budget)
    holds = min(limit.calls, limit.seconds / max(seconds, 1e-9))
    line = (
        f"one evaluation of one sample takes {seconds:.3g} s: the budget, {settings.budget}, holds "
        f"about {holds:,.0f}; measuring the handcrafted solvers takes about {start:,} of them"
    )
    if whole > start:
        line += f", up to {whole:,} where a few samples hold the error"
    if start <= holds:
        return line
    minutes = start * seconds / 60
    return (
        f"{line}, which is more: nothing will be trained after those {minutes:,.0f} minutes unless "
        "the budget is larger"
    )


def _stated_scale(pipe: Any, denoiser: PipelineDenoiser, arguments: dict[str, Any]) -> float | None:
    """The guidance scale of the distillation: measured, as asked for, or the pipeline's default."""
    scale = denoiser.network.call.guidance
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
        prompts = read_text(Path(prompts), MOST_PROMPTS).splitlines()
    texts = [line.strip() for line in prompts if line.strip()]
    if not texts:
        raise ValueError("prompts are empty, expected at least one line")
    return texts


def _attach(denoiser: Denoiser, features: str | None, shape: tuple[int, ...]) -> bool:
    """Taps ``features`` if the network has it with the length the designers read."""
    if features is None:
        return False
    try:
        if not denoiser.network.one_call:
            raise ValueError("a step has several calls, and each of them one")
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

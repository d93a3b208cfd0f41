"""``dlms distill``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from . import pipeline as pipelines
from .common import JsonOption, ModelOption, NfeOption, SetOption, emit, load_model, parse_settings


def distill(
    output: Annotated[Path, typer.Option("--output", "-o", help="Solver file to write.")],
    method: Annotated[
        str, typer.Option(help="dlms, amed, ld3, dode, gits or free_table.")
    ] = "dlms",
    nfe: NfeOption = 5,
    model: ModelOption = "embedded",
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Start noises to train on; default: the method's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training noise.")] = 0,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings of a paper and data set; dlms-embedded for the embedded model."
        ),
    ] = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint beside OUTPUT.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
    pipeline: pipelines.PipelineOption = None,
    prompts: pipelines.PromptsOption = None,
    guidance_scale: pipelines.GuidanceOption = None,
    call: pipelines.CallOption = None,
    cache: pipelines.CacheOption = None,
    device: pipelines.DeviceOption = "cpu",
    dtype: pipelines.DtypeOption = "float32",
    plot: Annotated[Path | None, typer.Option(help="Also draw the loss curve.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a sampler of NFE network evaluations; the network stays frozen."""
    settings = parse_settings(set_)
    asked = pipelines.PipelineOptions(pipeline, prompts, guidance_scale, call, cache, device, dtype)
    if asked.check():
        pipelines.distill_for_pipeline(
            asked, output, method=method, nfe=nfe, trajectories=trajectories, seed=seed, preset=preset,
            settings=settings, resume=resume, overwrite=overwrite, plot=plot, as_json=as_json,
        )  # fmt: skip
        return
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another --output, or give --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent} is no folder: create it, or choose another --output")
    from .. import learners
    from ..learners import presets

    held = load_model(model)
    if preset is None and model == "embedded" and method == "dlms":
        preset = "dlms-embedded"
    if preset is not None:
        chosen = presets.preset(preset)
        method = chosen.pop("method")
        trajectories = trajectories or chosen.pop("trajectories", None)
        settings = {**{k: v for k, v in chosen.items() if k != "trajectories"}, **settings}
    if settings.get("last_step") == "features":
        if held.features is None:
            raise ValueError("last_step=features needs a model with a feature network")
        settings["feature_network"] = held.features
    started = time.perf_counter()
    solver = learners.distill(
        held.denoiser,
        method,
        nfe=nfe,
        shape=held.shape,
        trajectories=trajectories,
        output=output,
        resume=resume,
        progress=not as_json,
        seed=seed,
        **settings,
    )
    seconds = time.perf_counter() - started
    if plot is not None:
        from ..plots import loss_curve

        loss_curve(solver.history, plot, step="update", title=f"{method}, {nfe} evaluations")
    emit(
        {
            "solver": output,
            "method": method,
            "preset": preset,
            "nfe": solver.nfe,
            "best": solver.best,
            "seconds": seconds,
            "plot": plot,
        },
        as_json,
        [
            f"{output}: {method} with {solver.nfe} evaluations, {seconds:.0f} s",
            *(f"  best {key}: {value}" for key, value in solver.best.items()),
            f"  try it: dlms sample --solver {output} --output samples.png",
        ],
    )

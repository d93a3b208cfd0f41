"""``dlms distill``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import config as configs
from . import pipeline as pipelines
from .checks import check_seed, check_solver_output, refuse_beside
from .common import JsonOption, NfeOption, SetOption, emit, leads, parse_settings
from .model import ConditionsOption, DeviceOption, ModelOption, load_model, of_model, samples_name
from .outcome import curve_drawn, outcome_lines, start_value


def distill_command(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Solver file to write.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Learner: auto (the default: improves on the best handcrafted solver), dlms, "
            "amed, ... (an unknown one lists them)."
        ),
    ] = None,
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
    budget: Annotated[
        str | None,
        typer.Option(
            help="Of method auto: minutes (10, 90s, 2h) or network evaluations of one sample "
            "(50000calls, 50k)."
        ),
    ] = None,
    conditions: ConditionsOption = None,
    resume: Annotated[
        bool, typer.Option(help="Continue from the checkpoint beside OUTPUT.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
    pipeline: pipelines.PipelineOption = None,
    prompts: pipelines.PromptsOption = None,
    guidance_scale: pipelines.GuidanceOption = None,
    call: pipelines.CallOption = None,
    cache: pipelines.CacheOption = None,
    device: DeviceOption = None,
    dtype: pipelines.DtypeOption = "float32",
    plot: Annotated[Path | None, typer.Option(help="Also draw the loss curve.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard events.")] = None,
    capture: Annotated[
        bool, typer.Option(help="On a GPU, replay the network's evaluations as CUDA graphs.")
    ] = False,
    config: configs.ConfigOption = None,
    show_config: configs.ShowConfigOption = False,
    as_json: JsonOption = False,
) -> None:
    """Distil a sampler of NFE network evaluations; the network stays frozen."""
    check_seed(seed)
    if preset is None and pipeline is None and model == "embedded" and method == "dlms":
        preset = "dlms-embedded"
    if method is None and preset is None:
        method = "auto"
    method, trajectories, settings = _settings(context, method or "", preset, trajectories, set_)
    if budget is not None:
        if method != "auto":
            raise ValueError(f"--budget {budget}: method {method} takes --trajectories instead")
        if configs.said_here(context, "budget") or "budget" not in parse_settings(set_):
            settings["budget"] = budget
    from ..learners.registry import resolved
    from ..support.parallel import restarted

    full = resolved(method, nfe, settings, trajectories=trajectories, seed=seed)
    found = configs.configuration(context, full)
    if show_config:
        configs.show_configuration(found, as_json)
        return
    if output is None:
        raise ValueError("no place for the solver: give --output FILE.safetensors")
    if pipeline is None:
        refuse_beside(context, "without --pipeline PATH", ("dtype",))
    else:
        refuse_beside(
            context, "beside --pipeline, which brings its own network", ("model", "conditions")
        )
    asked = pipelines.PipelineOptions(
        pipeline, prompts, guidance_scale, call, cache, device or "cpu", dtype
    )
    for_pipeline = asked.check()
    check_solver_output(output, folder_too=for_pipeline)
    if plot is not None:
        from ..lab.plots import check_plot

        check_plot(plot)
    if for_pipeline:
        pipelines.distill_for_pipeline(
            asked, output, method=method, nfe=nfe, trajectories=trajectories, seed=seed,
            settings={**settings, "tensorboard": tensorboard, "capture": capture}, resume=resume,
            overwrite=overwrite, plot=plot, as_json=as_json, found=found,
        )  # fmt: skip
        return
    if output.exists() and not overwrite and not restarted():
        raise ValueError(f"{output} exists: choose another --output, or give --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent} is no folder: create it, or choose another --output")
    from .. import learners

    held = load_model(model, device, conditions)
    if settings.get("last_step") == "features" and held.features is None:
        raise ValueError("last_step=features needs a model with a feature network")
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
        feature_network=held.features,
        conditions=held.conditions,
        tensorboard=tensorboard,
        capture=capture,
        **settings,
    )
    seconds = time.perf_counter() - started
    if not leads():
        return
    configs.write_resolved(output, found, solver)
    drawn = curve_drawn(solver.history, plot, f"{method}, {nfe} evaluations", output)
    emit(
        {
            "solver": output,
            "method": method,
            "preset": preset,
            "nfe": solver.nfe,
            "initial": start_value(method, solver.history),
            "best": solver.best,
            "seconds": seconds,
            "plot": drawn,
        },
        as_json,
        [
            f"{output}: {method} with {solver.nfe} evaluations, {seconds:.0f} s",
            *outcome_lines(method, solver.settings, solver.history, solver.best),
            f"  try it: dlms sample{of_model(model, conditions)} --solver {shlex.quote(str(output))} "
            f"--output {samples_name(held)}",
        ],
    )


def _settings(
    context: typer.Context,
    method: str,
    preset: str | None,
    trajectories: int | None,
    pairs: list[str] | None,
) -> tuple[str, int | None, dict[str, Any]]:
    """Method, trajectories and settings: those of the preset, of --config, of --set; the last win.

    Raises:
        ValueError: an option among the settings, or a preset of another method than the one said.
    """
    from ..learners.registry import flattened
    from ..learners.registry import preset as preset_named

    said = parse_settings(pairs)
    chosen: dict[str, Any] = {}
    if preset is not None:
        chosen = preset_named(preset)
        own = chosen.pop("method")
        if configs.given(context, "method") and own != method:
            raise ValueError(f"preset {preset!r} is for method {own!r}, not {method!r}")
        method = own
        trajectories = trajectories or chosen.get("trajectories")
        chosen.pop("trajectories", None)
    layers = (chosen, configs.file_settings(context), said)
    for name in ("nfe", "seed", "trajectories"):
        if any(name in layer for layer in layers):
            raise ValueError(f"{name} is no setting of the method: use --{name} instead")
    settings: dict[str, Any] = {}
    for layer in layers:
        settings |= flattened(method, layer)
    return method, trajectories, settings

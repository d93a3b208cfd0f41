"""``dlms distill --pipeline``: a solver for a diffusers checkpoint, on its own prompts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..support.files import SOLVER_FILE, require_writable
from .common import emit, leads, parse_settings
from .config import write_resolved
from .outcome import curve_drawn, outcome_lines, start_value

_DTYPES = ("float32", "bfloat16", "float16")
CONFIG_FILE = "scheduler_config.json"

PipelineOption = Annotated[
    str | None,
    typer.Option(help="Distil for this diffusers pipeline: a directory, or owner/name on the hub."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="With --pipeline: text file, one prompt a line.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(help="With --pipeline: guidance scale; default: the pipeline's own."),
]
CallOption = Annotated[
    list[str] | None,
    typer.Option(
        "--call", help="With --pipeline: key=value for its call, e.g. height=512; many times."
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(help="With --pipeline: folder of embeddings and latents; default: by OUTPUT."),
]
DtypeOption = Annotated[
    str, typer.Option(help=f"With --pipeline: weights of its network, one of {', '.join(_DTYPES)}.")
]


@dataclass(frozen=True)
class PipelineOptions:
    """The options that go with ``--pipeline``."""

    pipeline: str | None
    prompts: Path | None
    guidance_scale: float | None
    call: list[str] | None
    cache: Path | None
    device: str
    dtype: str

    def check(self) -> bool:
        """Whether a pipeline is asked for.

        Raises:
            ValueError: an option of pipelines without one, or one that cannot be.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        if self.pipeline is not None:
            if self.prompts is not None and not self.prompts.is_file():
                raise ValueError(f"prompts: {self.prompts} is no file; one prompt a line is read")
            return True
        for name in ("prompts", "guidance_scale", "call", "cache"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --pipeline PATH")
        return False


def distill_for_pipeline(
    options: PipelineOptions,
    output: Path,
    *,
    method: str,
    nfe: int,
    trajectories: int | None,
    seed: int,
    settings: dict[str, Any],
    resume: bool,
    overwrite: bool,
    plot: Path | None,
    as_json: bool,
    found: dict[str, Any],
) -> None:
    """Writes a solver file (OUTPUT ends in .safetensors) or a scheduler's directory.

    The configuration ``found``, as the run resolved it, goes beside the solver file.

    Raises:
        ValueError: the output exists, the pipeline or its prompts cannot be used.
        OSError: the output cannot be written.
    """
    solver_file = _target(output, overwrite)
    cache = options.cache or output.with_name(f"{output.stem}.cache")
    from ..integrations.pipelines.distill import distill_pipeline

    started = time.perf_counter()
    pipe = _loaded(options)
    _check_prompts(pipe, options)
    if solver_file != output:
        output.mkdir(exist_ok=True)
    scheduler = distill_pipeline(
        pipe,
        options.prompts,
        nfe=nfe,
        guidance_scale=options.guidance_scale,
        method=method,
        trajectories=trajectories,
        output=solver_file,
        folder=cache,
        pipeline_arguments=parse_settings(options.call),
        resume=resume,
        progress=not as_json,
        seed=seed,
        **settings,
    )
    if solver_file != output:
        scheduler.save_pretrained(output)
    solver: Any = scheduler.solver
    if leads():
        write_resolved(solver_file, found, solver)
    facts = {
        "solver": solver_file,
        "scheduler": None if solver_file == output else output,
        "pipeline": options.pipeline,
        "method": method,
        "nfe": solver.nfe,
        "initial": start_value(method, solver.history),
        "best": solver.best,
        "cache": cache,
        "seconds": time.perf_counter() - started,
        "plot": curve_drawn(solver.history, plot, f"{method}, {nfe} evaluations", output),
    }
    outcome = outcome_lines(method, solver.settings, solver.history, solver.best)
    emit(facts, as_json, _lines(facts, output, outcome))


def _lines(facts: dict[str, Any], output: Path, outcome: list[str]) -> list[str]:
    call = (
        f"DLMSScheduler.from_pretrained({str(output)!r})"
        if facts["scheduler"]
        else f"DLMSScheduler.from_config(pipe.scheduler.config, solver={str(output)!r})"
    )
    return [
        f"{output}: {facts['method']} with {facts['nfe']} evaluations, {facts['seconds']:.0f} s",
        *outcome,
        f"  embeddings and latents are kept in {facts['cache']}",
        f"  use it: pipe.scheduler = {call}",
    ]


def _target(output: Path, overwrite: bool) -> Path:
    """Where the solver file goes."""
    alone = output.suffix == ".safetensors"
    target = output if alone else output / SOLVER_FILE
    finished = output if alone else output / CONFIG_FILE
    if not alone and output.is_file():
        raise ValueError(f"{output} is a file: a solver file's name ends in .safetensors")
    if finished.exists() and not overwrite:
        raise ValueError(f"{finished} exists: choose another --output, or give --overwrite")
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent} is no folder: create it, or choose another --output")
    require_writable(target if output.is_dir() else output)
    return target


def _loaded(options: PipelineOptions) -> Any:
    import torch

    from ..integrations.pipelines.distill import load_pipeline
    from ..support.parallel import rank_device

    pipe = load_pipeline(options.pipeline, getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(rank_device(options.device))
    except (RuntimeError, AssertionError) as exc:  # torch says "not compiled with CUDA" by assert
        raise ValueError(f"device {options.device!r} cannot be used: {exc}") from exc


def _check_prompts(pipe: Any, options: PipelineOptions) -> None:
    """A text-conditional pipeline needs prompts, an unconditional one has no use for them."""
    import inspect

    known = set(inspect.signature(type(pipe).__call__).parameters)
    name = type(pipe).__name__
    if "prompt" in known and options.prompts is None and not options.call:
        raise ValueError(f"{name} needs --prompts FILE, one prompt a line")
    if "prompt" not in known and options.prompts is not None:
        raise ValueError(f"{name} takes no prompts: leave --prompts out")
    if "guidance_scale" not in known and options.guidance_scale is not None:
        raise ValueError(f"{name} takes no guidance: leave --guidance-scale out")
    unknown = sorted(set(parse_settings(options.call)) - known)
    if unknown:
        raise ValueError(
            f"--call {unknown[0]}: {name} takes {json.dumps(sorted(known - {'self'}))}"
        )

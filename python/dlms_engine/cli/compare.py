"""``dlms compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, command_line, emit, parse_numbers
from .model import ConditionsOption, DeviceOption, ModelOption, distance_features, load_model


def compare_command(
    nfe: Annotated[str, typer.Option(help="Evaluations to compare: numbers and ranges.")] = "3-10",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names of learners and of their variants, with commas; default: every learner."
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Instead of methods: ablation or interpolation (M), both of DLMS."),
    ] = None,
    budget: Annotated[
        int, typer.Option(min=1, help="Network calls (forward and backward) a distillation.")
    ] = 100_000,
    samples: Annotated[int, typer.Option(min=2, help="Samples of the Frechet distance.")] = 2000,
    exact_samples: Annotated[int, typer.Option(min=2, help="Samples of the endpoint RMSE.")] = 1000,
    exact_nfe: Annotated[int, typer.Option(min=1, help="Evaluations of the exact solution.")] = 96,
    accurate_nfe: Annotated[
        int, typer.Option(min=1, help="Evaluations of the accurate samples.")
    ] = 24,
    screen_samples: Annotated[
        int,
        typer.Option(min=0, help="Samples to find the best handcrafted solver on; 0: leave out."),
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 125,
    trajectories: Annotated[
        int | None,
        typer.Option(min=1, help="Start noises a distillation, instead of what --budget pays for."),
    ] = None,
    seed: Annotated[
        str,
        typer.Option(
            help="Seeds of the training noise: numbers and ranges; several give mean and error."
        ),
    ] = "0",
    folder: Annotated[
        Path, typer.Option(help="Where everything is kept; a second call continues there.")
    ] = Path("compare-out"),
    model: ModelOption = "embedded",
    conditions: ConditionsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil every method at the same cost and budget, and measure them side by side."""
    from ..lab.comparison import CompareSettings, choose
    from ..lab.comparison import compare as run
    from ..lab.comparison.page import markdown, publish

    if methods is not None and study is not None:
        raise ValueError("give --methods or --study, not both")
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    tuned = choose(names, study)
    settings = CompareSettings(
        nfes=tuple(parse_numbers(nfe, "nfe")),
        budget=budget,
        samples=samples,
        exact_samples=min(exact_samples, samples),
        shown=min(CompareSettings().shown, exact_samples, samples),
        exact_nfe=exact_nfe,
        accurate_nfe=accurate_nfe,
        screen_samples=screen_samples,
        batch=batch,
        training_seeds=tuple(parse_numbers(seed, "seed")),
        trajectories=trajectories,
    )
    held = load_model(model, device, conditions)
    process = held.denoiser.process
    contestants = choose(names, study, process)
    if not as_json and contestants != tuned:
        print(f"{process.name}: learners with their own defaults, not those tuned on EDM")
    result = run(
        held.denoiser,
        distance_features(held),
        held.reference,
        held.shape,
        contestants,
        folder,
        settings,
        conditions=held.conditions,
        progress=not as_json,
    )
    paths = publish(result, folder, "compare", command=command_line())
    emit(result, as_json, [markdown(result), *map(str, paths)])

"""``dlms export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .checks import HANDCRAFTED, refuse_beside
from .common import (
    AfsOption,
    GridOption,
    JsonOption,
    MethodOption,
    NfeOption,
    OrderOption,
    SetOption,
    choose_solver,
    emit,
    parse_settings,
)
from .model import ConditionsOption, ModelOption, condition_rows, load_model


def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Package to write; ends in .pt2.")],
    solver: Annotated[
        Path | None, typer.Argument(help="Solver file written by dlms distill.")
    ] = None,
    method: MethodOption = None,
    nfe: NfeOption = 5,
    grid: GridOption = None,
    order: OrderOption = None,
    afs: AfsOption = "off",
    set_: SetOption = None,
    batch: Annotated[
        int, typer.Option(min=0, help="The only batch it will take; 0 for any up to --max-batch.")
    ] = 0,
    max_batch: Annotated[
        int | None, typer.Option(min=2, help="Largest batch; by default as large as one can be.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the package will run: cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    model: ModelOption = "embedded",
    conditions: ConditionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write model and solver as one package that runs without this library."""
    if solver is not None:
        refuse_beside(context, "beside a solver file", HANDCRAFTED)
    if output.suffix != ".pt2":
        raise ValueError(f"output is {output}: a package's name ends in .pt2")
    if batch:
        refuse_beside(context, f"with --batch {batch}", ("max_batch",))
    import torch

    from ..engine.export import export_sampler, refuse_existing
    from ..engine.sampler import Sampler
    from ..support.parallel import rank_device

    refuse_existing(output, overwrite)
    place = rank_device(device)
    options = parse_settings(set_)
    held = load_model(model, conditions=conditions)
    label, policy = choose_solver(
        held.denoiser.process, solver, method, nfe, grid=grid, order=order, afs=afs, options=options
    )
    sampler = Sampler(held.denoiser, policy).to(place)
    noise = torch.zeros(batch or 2, *held.shape, device=place)
    started = time.perf_counter()
    rows = condition_rows(held, range(len(noise)), noise.device)
    export_sampler(
        sampler,
        noise,
        output,
        conditions=rows or None,
        dynamic_batch=batch == 0,
        max_batch=max_batch,
        overwrite=overwrite,
    )
    seconds = time.perf_counter() - started
    facts = {
        "output": output,
        "solver": label,
        "nfe": sampler.nfe,
        "bytes": output.stat().st_size,
        "seconds": seconds,
    }
    line = f"{output}: {label}, {sampler.nfe} network evaluations, compiled in {seconds:.0f} s"
    emit(facts, as_json, [line, f'  run = torch._inductor.aoti_load_package("{output}")'])

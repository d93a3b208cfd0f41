"""``dlms recommend``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..support.files import require_writable
from .checks import check_solver_output
from .common import JsonOption, NfeOption, emit
from .model import ConditionsOption, DeviceOption, ModelOption, load_model


def recommend_command(
    model: ModelOption = "embedded",
    device: DeviceOption = None,
    nfe: NfeOption = 5,
    effort: Annotated[
        str,
        typer.Option(help="full, lean (at most 1,500 evaluations of one sample) or auto."),
    ] = "auto",
    store: Annotated[
        Path | None, typer.Option(help="File that keeps the result; used again if it is there.")
    ] = None,
    conditions: ConditionsOption = None,
    save: Annotated[
        Path | None, typer.Option("--output", "-o", help="Solver file to write the best table to.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every handcrafted solver on the model: which is best for NFE evaluations?"""
    if effort not in ("auto", "full", "lean"):
        raise ValueError(f"effort is {effort!r}, expected auto, full or lean")
    if save is not None:
        check_solver_output(save)
        require_writable(save)
    if store is not None and not store.exists():
        require_writable(store)
    from ..learners.start import recommend
    from ..policies.distilled import save_solver

    loaded = load_model(model, device, conditions)
    start = recommend(
        loaded.denoiser,
        nfe,
        loaded.shape,
        conditions=loaded.conditions,
        effort=effort,  # type: ignore[arg-type]
        store=store,
        progress=not as_json,
    )
    if save is not None:
        save_solver(save, start.best.table)
    emit({**start.record(), "output": save}, as_json, [])

"""``dlms sample``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    AfsOption,
    BackendOption,
    GridOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NfeOption,
    OrderOption,
    SetOption,
    SolverOption,
    choose_solver,
    emit,
    load_model,
    parse_seeds,
    parse_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".safetensors")


def sample(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture (.png), or .safetensors for raw values.")
    ] = Path("samples.png"),
    solver: SolverOption = None,
    method: MethodOption = None,
    nfe: NfeOption = 5,
    grid: GridOption = "polynomial",
    order: OrderOption = None,
    afs: AfsOption = "off",
    set_: SetOption = None,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges, one image each.")] = "0-63",
    batch: Annotated[
        int, typer.Option(min=1, help="Images at a time; the result is the same.")
    ] = 64,
    columns: Annotated[int, typer.Option(min=0, help="Images a row; 0 makes a square.")] = 0,
    backend: BackendOption = "auto",
    model: ModelOption = "embedded",
    as_json: JsonOption = False,
) -> None:
    """Sample images with a solver file or a handcrafted solver."""
    numbers = parse_seeds(seeds)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output is {output}, expected one of {', '.join(SUFFIXES)}")
    options = parse_settings(set_)
    import torch

    from ..sampler import Sampler

    held = load_model(model)
    label, policy = choose_solver(
        held.denoiser.process, solver, method, nfe, grid=grid, order=order, afs=afs, options=options
    )
    sampler = Sampler(held.denoiser, policy, backend=backend)
    started = time.perf_counter()
    parts = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    images = torch.cat([sampler.sample(part, held.shape) for part in parts])
    seconds = time.perf_counter() - started
    _write(images, output, columns or math.ceil(math.sqrt(len(numbers))))
    emit(
        {
            "output": output,
            "solver": label,
            "nfe": sampler.nfe,
            "images": len(numbers),
            "seconds": seconds,
        },
        as_json,
        [
            f"{output}: {len(numbers)} images, {label}, {sampler.nfe} network evaluations each, "
            f"{seconds:.1f} s"
        ],
    )


def _write(images: Tensor, output: Path, columns: int) -> None:
    if output.suffix == ".safetensors":
        from safetensors.torch import save_file

        partial = output.with_name(f".{output.name}.partial")
        save_file({"samples": images.contiguous()}, partial)
        partial.replace(output)
        return
    from .. import plots

    plots.samples(images, output, columns=columns)

"""``dlms sample``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..support.files import replacing, require_writable
from .checks import HANDCRAFTED, refuse_beside
from .common import (
    AfsOption,
    BackendOption,
    GridOption,
    JsonOption,
    MethodOption,
    NfeOption,
    OrderOption,
    SetOption,
    SolverOption,
    choose_solver,
    emit,
    leads,
    parse_numbers,
    parse_settings,
)
from .model import ConditionsOption, DeviceOption, ModelOption, condition_rows, load_model

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".safetensors")


def sample(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture (.png), or .safetensors for raw values.")
    ] = Path("samples.png"),
    solver: SolverOption = None,
    method: MethodOption = None,
    nfe: NfeOption = 5,
    grid: GridOption = None,
    order: OrderOption = None,
    afs: AfsOption = "off",
    set_: SetOption = None,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges, one sample each.")] = "0-63",
    batch: Annotated[
        int, typer.Option(min=1, help="Samples at a time; the result is the same.")
    ] = 64,
    columns: Annotated[int, typer.Option(min=0, help="Images a row; 0 makes a square.")] = 0,
    backend: BackendOption = "auto",
    model: ModelOption = "embedded",
    conditions: ConditionsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample images with a solver file or a handcrafted solver."""
    numbers = parse_numbers(seeds)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"output is {output}, expected one of {', '.join(SUFFIXES)}")
    if solver is not None:
        refuse_beside(context, "beside --solver FILE", HANDCRAFTED)
    if output.suffix == ".safetensors":
        refuse_beside(context, "on raw values", ("columns",))
    from ..lab import plots

    if output.suffix != ".safetensors":
        plots.pillow()  # ahead of the work
    options = parse_settings(set_)
    import torch

    from ..engine.sampler import Sampler

    held = load_model(model, device, conditions)
    if output.suffix != ".safetensors" and not plots.is_image(held.shape):
        raise ValueError(
            f"output is {output}, but samples of shape {held.shape} are no pictures: name a "
            ".safetensors file"
        )
    label, policy = choose_solver(
        held.denoiser.process, solver, method, nfe, grid=grid, order=order, afs=afs, options=options
    )
    sampler = Sampler(held.denoiser, policy, backend=backend)
    started = time.perf_counter()
    parts = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]

    def draw(part: list[int]) -> Tensor:
        images: Tensor = sampler.sample(part, held.shape, **condition_rows(held, part))
        return images

    if leads():
        require_writable(output)
    images = torch.cat(_shared(draw, parts, held.shape))
    seconds = time.perf_counter() - started
    if not leads():
        return
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
            f"{output}: {len(numbers)} samples, {label}, {sampler.nfe} network evaluations each, "
            f"{seconds:.1f} s"
        ],
    )


def _shared(
    sample: Callable[[list[int]], Tensor], parts: list[list[int]], shape: tuple[int, ...]
) -> list[Tensor]:
    """The images of every part in order: processes take whole parts, so who takes it is not seen."""
    import torch

    from ..support.parallel import World
    from ..support.transfer import to_host

    world = World.current()
    found: list[Tensor] = []
    for part_numbers in world.rounds(len(parts)):
        own = world.deal(part_numbers)
        images = torch.zeros(0, *shape) if own is None else to_host(sample(parts[own]))
        if world.size > 1:  # all ranks send as many
            images = torch.cat([images, torch.zeros(len(parts[0]) - len(images), *shape)])
        several = world.gather(images)
        found += [several[rank][: len(parts[k])] for rank, k in enumerate(part_numbers)]
    return found


def _write(images: Tensor, output: Path, columns: int) -> None:
    if output.suffix == ".safetensors":
        from safetensors.torch import save_file

        with replacing(output) as partial:
            save_file({"samples": images.contiguous()}, partial)
        return
    from ..lab import plots

    plots.samples(images, output, columns=columns)

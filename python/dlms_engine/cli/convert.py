"""``dlms convert``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, SetOption, emit, parse_settings
from .model import load_model


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="EDM .pkl, guided-diffusion .pt or latent-diffusion .ckpt; or a learned solver of AMED, "
            "DyWeight, EPD, GAS or LD3 (.pkl, .pt)."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    set_: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of a learned solver: the model it will run, for its noise levels, as in dlms sample. "
            "Default: what the file says it was made for."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint or a published learned solver, without running pickled code.

    What a file does not say comes from --set. guided-diffusion: num_head_channels=64,
    use_new_attention_order=true, noise_schedule=cosine. LD3: solver=uni_pc, order=3. GAS: t_eps=0.001.
    """
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another name, or give --overwrite")
    from ..checkpoints.published import published_format

    settings = parse_settings(set_)
    name = published_format(source)
    if name is not None:
        _convert_solver(source, output, name, model, settings, as_json)
    elif model is not None:
        raise ValueError(f"--model is for learned solvers, and {source} is none that is known")
    else:
        _convert_network(source, output, settings, as_json)


def _convert_network(source: Path, output: Path, settings: dict[str, Any], as_json: bool) -> None:
    from ..checkpoints.load import checkpoint_kind, convert_checkpoint

    written = convert_checkpoint(source, output, **settings)
    found = checkpoint_kind(written)
    use = (
        f"dlms_engine.checkpoints.single_file.load_single_file({str(output)!r})"
        if found == "ldm"
        else f"dlms_engine.checkpoints.load.load_checkpoint({str(output)!r})"
    )
    size = written.stat().st_size
    emit(
        {"output": written, "kind": found, "bytes": size},
        as_json,
        [f"{written}: {found}, {size / 1e6:.1f} MB", f"  use it: {use}"],
    )


def _convert_solver(
    source: Path,
    output: Path,
    name: str,
    model: str | None,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    from ..checkpoints.published import load_published

    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: the output's name must end in .safetensors")
    process = None if model is None else load_model(model).denoiser.process
    solver = load_published(source, process, **settings)
    written = solver.save(output)
    told = {k: v for k, v in solver.settings.items() if k != "method"}
    emit(
        {"output": written, "kind": "solver", "format": name, "nfe": solver.nfe, "settings": told},
        as_json,
        [
            f"{written}: a solver of {name}, {solver.nfe} evaluations, for {solver.policy.process!r}",
            *(f"  {key}: {value}" for key, value in told.items()),
            f"  use it: dlms sample --solver {shlex.quote(str(output))} "
            f"--model {model or 'module:function'}",
        ],
    )

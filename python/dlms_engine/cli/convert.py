"""``dlms convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import JsonOption, SetOption, emit, parse_settings


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="EDM .pkl, guided-diffusion .pt, or latent-diffusion .ckpt.")
    ],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    set_: SetOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint to safetensors once, without running pickled code.

    What a guided-diffusion file does not say comes from --set: num_head_channels=64,
    use_new_attention_order=true, noise_schedule=cosine.
    """
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another name, or give --overwrite")
    from ..checkpoints.load import checkpoint_kind, convert_checkpoint

    written = convert_checkpoint(source, output, **parse_settings(set_))
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

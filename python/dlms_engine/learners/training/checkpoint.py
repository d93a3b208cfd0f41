"""Checkpoints of a distillation: one safetensors file, written atomically, never a pickle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...support.files import replacing

FORMAT = "dlms_engine.checkpoint/1"


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], state: Any, fingerprint: dict[str, Any]
) -> None:
    """Writes beside ``path`` and renames, so that a full disk or a kill leaves the old file."""
    metadata = {
        "format": FORMAT,
        "state": json.dumps(asdict(state)),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata)
    except OSError as error:
        raise OSError(
            f"could not write the checkpoint {path} ({error.strerror or error}): free some space "
            "or choose another output; the previous checkpoint is untouched"
        ) from error


def load_checkpoint(
    path: Path, fingerprint: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of ``path``.

    Raises:
        ValueError: not a checkpoint, or one of a run with other settings (both are named).
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this library: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}")
    held = json.loads(metadata["fingerprint"])
    wanted = json.loads(json.dumps(fingerprint))
    changed = {k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k)}
    if changed:
        differences = ", ".join(
            f"{k}: {held.get(k)!r} -> {wanted.get(k)!r}" for k in sorted(changed)
        )
        raise ValueError(
            f"{path} belongs to a run with other settings ({differences}): "
            "give the same settings, or another output, or start without resume"
        )
    return load_file(path), json.loads(metadata["state"])

"""Checkpoints of a distillation: one safetensors file, written atomically, never a pickle.

A checkpoint is taken up again only if its bytes are intact (a SHA-256 over everything in it) and it
belongs to the same run: settings, network, process, guidance, conditions and code version make up the
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...support.files import write_tensors, written

_FORMAT = "dlms_engine.checkpoint/2"

HARMLESS = {"checkpoint_seconds", "checkpoint_every"}
"""Settings that change when a checkpoint is written and nothing else: a resumed run may change them."""


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], state: Any, fingerprint: dict[str, Any]
) -> None:
    """Replaces ``path``; a full disk or a kill leaves the old file.

    Raises:
        OSError: it could not be written; says so in one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    text = {
        "state": json.dumps(asdict(state)),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
    }
    metadata = {"format": _FORMAT, **text, "sha256": _digest(held, text)}
    write_tensors(path, held, metadata)


def try_to_save(save: Callable[[], None], update: int) -> bool:
    """Calls ``save``; a checkpoint that cannot be written does not end a training that can go on."""
    return written(save, f"update {update}: no checkpoint")


def read_checkpoint(
    path: Path, fingerprint: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of ``path``.

    Raises:
        ValueError: not a checkpoint, a damaged one, or one of another run (what differs is named).
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this library: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: format {metadata.get('format')!r}, expected {_FORMAT!r}: start without resume, "
            "or finish this run with the version that began it"
        )
    text = {name: metadata.get(name, "") for name in ("state", "fingerprint")}
    if metadata.get("sha256") != _digest(tensors, text):
        raise ValueError(
            f"{path} is damaged, its checksum does not fit its contents: start without resume"
        )
    _check_run(path, json.loads(text["fingerprint"]), json.loads(json.dumps(fingerprint)))
    return tensors, json.loads(text["state"])


def _check_run(path: Path, written: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = (written.keys() | wanted.keys()) - HARMLESS
    changed = sorted(k for k in names if written.get(k) != wanted.get(k))
    if changed:
        differences = ", ".join(
            f"{k}: {str(written.get(k))[:80]} -> {str(wanted.get(k))[:80]}" for k in changed
        )
        raise ValueError(
            f"{path} belongs to another run ({differences}): give the same settings, network and "
            "guidance, or another output, or start without resume"
        )


def _digest(tensors: dict[str, Tensor], text: dict[str, str]) -> str:
    """Over names, dtypes, shapes and bytes in the order of the names, and over the texts."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name in sorted(text):
        total.update(json.dumps([name, text[name]]).encode())
    return total.hexdigest()

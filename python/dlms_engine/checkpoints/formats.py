"""Version checks of the files the integrations write, and reading tensors without running code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from .._version import __version__
from .restricted import UnsafeCheckpointError

WRITTEN_BY = "written_by"
_ADVICE = (
    "It is not loaded, because that could run code. If you trust the file, take its tensors out in an "
    "environment of its own: safetensors.torch.save_file(torch.load(path, weights_only=False)"
    "['state_dict'], 'weights.safetensors'), or without ['state_dict'] if it is one itself"
)
# where training scripts put the weights among other things
NESTED = ("state_dict", "model_state_dict", "model", "ema")


def stamp(format_: str) -> dict[str, str]:
    """The metadata every file gets: its format and who wrote it."""
    return {"format": format_, WRITTEN_BY: __version__}


def check_format(path: Path, metadata: Mapping[str, str], expected: str) -> None:
    """Refuses files of another kind, and of another version of this kind.

    Raises:
        ValueError: naming what the file is and what to do.
    """
    found = metadata.get("format", "")
    if found == expected:
        return
    if found.partition("/")[0] != expected.partition("/")[0]:
        raise ValueError(f"{path}: format is {found or None!r}, expected {expected!r}")
    writer = metadata.get(WRITTEN_BY, "another version")
    raise ValueError(
        f"{path} is in format {found!r}, written by dlms_engine {writer}; this is {__version__}, which "
        f"reads {expected!r}: convert the original checkpoint again with this version, or install the "
        "one that wrote it"
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file.

    Raises:
        ValueError: not a safetensors file.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            return dict(opened.metadata() or {})
    except safetensors.SafetensorError as exc:
        raise ValueError(f"{path} is not an intact safetensors file: {exc}") from exc


def read_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Raises:
        UnsafeCheckpointError: the file holds more than tensors, numbers and containers.
        ValueError: it holds no state dict.
    """
    if path.suffix == ".safetensors":
        read_metadata(path)
        return load_file(path)
    held = load_plain(path)
    found = _state_dict(held)
    if found is None:
        raise ValueError(f"{path} holds {type(held).__name__}, expected a state dict of tensors")
    return found


def load_plain(path: Path) -> Any:
    """What ``torch.save`` wrote, as far as it is tensors, numbers and containers.

    Raises:
        UnsafeCheckpointError: it is anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as exc:  # torch raises UnpicklingError, RuntimeError, EOFError and more
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise UnsafeCheckpointError(f"{path} is refused: {reason}. {_ADVICE}") from exc


def _state_dict(held: Any, depth: int = 4) -> dict[str, Tensor] | None:
    if not isinstance(held, dict) or not depth:  # a file's dict may hold itself
        return None
    if held and all(isinstance(value, Tensor) for value in held.values()):
        return {str(key): value for key, value in held.items()}
    return next(
        (s for name in NESTED if (s := _state_dict(held.get(name), depth - 1)) is not None), None
    )

"""Tensors on disk under a key that says what they are: the cache that lets a record run resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...learners.start.problem import SamplingProblem
from ...learners.start.store import answers
from ...learners.training.identity import unusual_wrapping
from ...support.files import replacing

_FORMAT = "dlms_engine.record/1"


class Store:
    """A folder of safetensors files; a file whose key is another one counts as absent.

    Files are written beside their name and renamed, so a kill leaves the old file or the new one.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def load(self, name: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Tensors saved as ``name`` under an equal ``key``, or None."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(str(path), framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT or metadata.get("key") != _text(key):
                    return None
                return {held: opened.get_tensor(held) for held in opened.keys()}  # noqa: SIM118
        except safetensors.SafetensorError:  # damaged: computed anew
            return None

    def save(self, name: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces what is saved as ``name``."""
        kept = {held: tensor.detach().cpu().contiguous() for held, tensor in tensors.items()}
        with replacing(self._path(name)) as partial:
            save_file(kept, partial, {"format": _FORMAT, "key": _text(key)})

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def digest(tensors: Mapping[str, Tensor], *facts: Any) -> str:
    """First 16 hex digits of the SHA-256 of names, dtypes, shapes, bytes and JSON-able facts."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def network_digest(network: object) -> str:
    """Digest of a network's weights; of its type's name for a plain callable."""
    if isinstance(network, nn.Module):
        return digest(dict(network.state_dict()), type(network).__name__)
    return digest({}, type(network).__name__)


def model_digest(problem: SamplingProblem) -> str:
    """Digest of a model but for its process and conditions: of the weights, and of how they are wrapped.

    A network without weights is known by its answers, to three digits.
    """
    denoiser = problem.denoiser
    network, facts = denoiser.network, unusual_wrapping(denoiser)
    if not (isinstance(network, nn.Module) and network.state_dict()):
        numbers = [number for pair in answers(problem) for number in pair]
        facts["answers"] = [f"{number:.2e}" for number in numbers]
    weights = network_digest(network)
    return f"{weights} {digest({}, facts)}" if facts else weights

"""What makes two runs the same run beside their settings: the model and what it is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...models.denoiser import Denoiser, usual_prediction
from ...models.preconditioning import NamedTime

WHOLE = 65_536
"""Tensors with at most this many elements are read whole."""
SAMPLED = 4_096
"""Elements read of a larger one, evenly spread: a network of gigabytes is known in a second."""


def run_identity(denoiser: Denoiser, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values that differ where a run is not the same: for the fingerprint of a checkpoint.

    Args:
        denoiser: its network's weights (those of large tensors at ``SAMPLED`` places), process,
            prediction, time input, guidance and thresholding.
        conditions: what the network is given beside state and time.
    """
    process = json.dumps(denoiser.process.config(), sort_keys=True, default=str)
    return {
        "network": _network(denoiser.network),
        "process": process if len(process) < 200 else _text(process),
        **_wrapping(denoiser),
        "conditions": _values(conditions),
        "version": __version__,
    }


def unusual_wrapping(denoiser: Denoiser) -> dict[str, Any]:
    """How the network is wrapped where that is not the usual for its process, as JSON values.

    With the weights, the process and the conditions it says what a model answers: for keys of caches.
    """
    usual = {"prediction": usual_prediction(denoiser.network_process), "sigma_data": 0.5}
    wrapping = _wrapping(denoiser)
    if denoiser.prediction != "edm":
        del wrapping["sigma_data"]  # nothing reads it
    return {name: value for name, value in wrapping.items() if value != usual.get(name)}


def _wrapping(denoiser: Denoiser) -> dict[str, Any]:
    return {
        "prediction": denoiser.prediction,
        "sigma_data": denoiser.sigma_data,
        "guidance_scale": denoiser.guidance_scale,
        "unconditional": _values(denoiser.unconditional),
        "time_input": _time_input(denoiser._time_input),
        "dynamic_thresholding": denoiser.dynamic_thresholding,
    }


def _time_input(given: Any) -> str | None:
    if isinstance(given, NamedTime):
        return f"{given.scale:g} * {given.name}"
    return None if given is None else str(getattr(given, "__qualname__", type(given).__qualname__))


def conditions_digest(conditions: Any) -> str | None:
    """What the network is given, in 16 hex digits: values by name, a callable by its name."""
    return _values(named_conditions(conditions))


def named_conditions(conditions: Any) -> dict[str, Any]:
    """Conditions as values by name; a callable by its own."""
    if not conditions:
        return {}
    if callable(conditions):
        return {"callable": getattr(conditions, "__qualname__", type(conditions).__qualname__)}
    return dict(conditions)


def _text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _network(network: Any) -> str:
    if not isinstance(network, nn.Module):
        return str(getattr(network, "__qualname__", type(network).__qualname__))
    tensors = network.state_dict(keep_vars=True).items()
    return f"{type(network).__name__}:{_digest((n, t) for n, t in tensors)}"


def _values(values: Mapping[str, Any]) -> str | None:
    if not values:
        return None
    pairs = [(str(name), values[name]) for name in sorted(values, key=str)]
    return _digest(pairs)


def _digest(pairs: Iterable[tuple[str, Any]]) -> str:
    total = hashlib.sha256()
    for name, value in pairs:
        total.update(name.encode())
        if isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(_bytes(value.detach()))
        elif isinstance(value, list | tuple):  # their text leaves out most of a large tensor
            total.update(str(_values({str(i): v for i, v in enumerate(value)})).encode())
        elif isinstance(value, Mapping):
            total.update(str(_values(value)).encode())
        elif not callable(value):  # a callable's text would hold an address
            total.update(str(value).encode())
    return total.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    if value.is_meta or value.numel() == 0 or value.is_quantized or value.layout != torch.strided:
        return b""
    flat = value.reshape(-1)
    if flat.numel() > WHOLE:
        flat = flat[:: -(-flat.numel() // SAMPLED)]
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()

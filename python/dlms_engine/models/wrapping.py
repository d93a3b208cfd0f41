"""Refusals of a network that a ``Denoiser`` cannot be made of, and of keywords that it does not take."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..processes import Process

_TIMES = frozenset(("t", "time", "times", "timestep", "timesteps", "sigma", "sigmas"))
_STATES = frozenset(("x", "xt", "x_t", "y", "z", "sample", "samples", "state", "latent", "latents"))


def check_wrapping(network: Any, process: Any) -> None:
    """Raises before the first call for what is no network or no process.

    Raises:
        TypeError: ``network`` cannot be called, or ``process`` is a class, a name, or something else.
    """
    if isinstance(process, type):
        raise TypeError(
            f"process is the class {process.__name__}, expected one: {process.__name__}()"
        )
    if not isinstance(process, Process):
        raise TypeError(
            f"process is {process!r}, expected one of dlms_engine.processes, such as EDM() or "
            "RectifiedFlow()"
        )
    if not callable(network):
        raise TypeError(
            f"network is {type(network).__name__}, expected a callable network(x, c_noise)"
        )


def check_keywords(network: Any, given: Iterable[str]) -> None:
    """Raises where ``network(x, c_noise, **conditions)`` cannot be called with conditions so named.

    A network whose signature Python does not know is left to its first call.

    Raises:
        ValueError: one that it needs is not given, one is given that it does not take, or it takes the
            time ahead of ``x``.
    """
    if isinstance(network, nn.Module):
        network = network.forward
    try:
        parameters = list(inspect.signature(network).parameters.values())
    except (TypeError, ValueError):
        return
    kinds = {each.kind for each in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # wrapped by something that hands on what it gets
        return
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [each for each in parameters if each.kind in by_place][:2]
    if len(first) < 2:
        raise ValueError(
            f"the network takes ({', '.join(each.name for each in parameters)}), expected "
            "network(x, c_noise): x [B, ...] and the noise level [B]"
        )
    one, two = (each.name for each in first)
    if one.lower() in _TIMES and two.lower() in _STATES:  # as solvers of ODEs call f(t, x)
        raise ValueError(
            f"the network takes ({one}, {two}), the time first, expected network(x, c_noise): give a "
            "function around it, such as lambda x, t, **more: network(t, x, **more)"
        )
    rest = [each for each in parameters if each not in first]
    takes = [each.name for each in rest if each.kind is not inspect.Parameter.VAR_KEYWORD]
    names = set(given)
    absent = [
        each.name
        for each in rest
        if each.name in takes and each.default is each.empty and each.name not in names
    ]
    if absent:
        example = f"conditions={{{absent[0]!r}: tensor}}"
        raise ValueError(
            f"the network needs {', '.join(absent)} beside x and c_noise, and the conditions have "
            f"{sorted(names) or 'nothing'}: give {example}; to a command --conditions FILE, or from the "
            "model's function (denoiser, shape, conditions)"
        )
    unknown = sorted(names - set(takes))
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"conditions have {', '.join(unknown)}, which the network does not take: it takes "
            f"{', '.join(takes) or 'x and c_noise alone'}"
        )

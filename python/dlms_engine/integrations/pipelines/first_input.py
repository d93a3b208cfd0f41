"""The first network input of an analytical first step, where the pipeline does not scale it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

UNSCALED = (
    "this solver has an analytical first step, which rescales the network's first input, but the "
    "pipeline joins other things to it without calling scale_model_input: use a solver without it"
)
UNSEEN = (
    "this solver's first network input is rescaled, but the pipeline does not call scale_model_input, "
    "and its call of {} is not known by a tensor and a time before the first step: use a solver without "
    "an analytical first step"
)


def scaled_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], factor: float
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The same arguments with the sample, whatever it is called, times ``factor``.

    None for a call without a sample or without a time: an image encoder's or an adapter's.
    """
    timed = any(name == "t" or name.startswith("timestep") for name in kwargs)
    if not timed and not (len(args) > 1 and _is_time(args[1])):
        return None
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return ((args[0] * factor).to(args[0].dtype), *args[1:]), kwargs
    for name in ("sample", "hidden_states"):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, name: (value * factor).to(value.dtype)}
    return None


def _is_time(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim <= 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""When two calls of a pipeline are of one kind: what was proven for one may hold for the other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def bound(call: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, defaults included, as far as they can be known."""
    try:
        signature = inspect.signature(call)
        binding = signature.bind(pipe, *args, **kwargs)
    except (TypeError, ValueError):  # the pipeline itself will say what is wrong
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    binding.apply_defaults()
    found = dict(list(binding.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:  # a modular pipeline's
            found |= found.pop(name, {})
    return found


def kind_of_call(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What must be alike: numbers and flags by value; texts, tensors and images by their form."""
    return tuple((name, _kind(value)) for name, value in sorted(arguments.items()))


def _kind(value: Any) -> Any:
    if isinstance(value, (bool, int, float, type(None), torch.dtype, torch.device)):
        return (type(value).__name__, value)
    if isinstance(value, str):
        return ("text", bool(value)) if len(value) > 24 or " " in value else ("text", value)
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, str(value.device))
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, dict):
        return tuple(
            (str(k), _kind(v)) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))
        )
    if isinstance(value, (list, tuple)):
        numbers = len(value) > 64 and all(isinstance(v, (int, float)) for v in value)
        return tuple(value) if numbers else (type(value).__name__, *(_kind(v) for v in value))
    shape = getattr(value, "shape", getattr(value, "size", None))
    return (type(value).__name__, str(shape) if isinstance(shape, tuple) else "")


def follows_the_steps(arguments: dict[str, Any]) -> str | None:
    """The name of an argument that is called during the loop (a callback); None without."""
    for name, value in arguments.items():
        called = callable(value) and not isinstance(value, (type, Tensor))
        if name.startswith("callback") and (called or hasattr(value, "on_step_end")):
            return name
        if called and not isinstance(value, torch.nn.Module):
            return name
    return None


def scales_of(arguments: dict[str, Any], pipe: Any) -> list[float]:
    """Numbers among the arguments and on the pipeline that a guidance weight may be."""
    found = [v for k, v in arguments.items() if isinstance(v, (int, float)) and "scale" in k]
    own = getattr(pipe, "_guidance_scale", None)
    if isinstance(own, (int, float)):
        found.append(own)
    return sorted({float(v) for v in found if not isinstance(v, bool)})


def generators_of(arguments: dict[str, Any]) -> list[torch.Generator]:
    """Every random generator among the arguments."""
    leaves = pytree.tree_leaves(arguments)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]


def short(arguments: dict[str, Any]) -> str:
    """Numbers and names among the arguments, for a report."""
    shown = {k: v for k, v in arguments.items() if isinstance(v, (bool, int, float))}
    return ", ".join(f"{k}={v}" for k, v in shown.items())

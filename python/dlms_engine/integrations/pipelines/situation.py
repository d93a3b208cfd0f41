"""What stands around a network's own code: replaced forwards, hooks, attention processors.

The engine calls a network after the pipeline's last step. What a pipeline or its guider puts on it for
one call, and takes off after it, would be missing then; a forward that was replaced by hand may
remember earlier calls, which a captured run would not repeat.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

KNOWN = (
    "torch",
    "diffusers",
    "accelerate",
    "peft",
    "transformers",
)  # their state is looked at apart
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type,
    types.ModuleType,
    Tensor,
    nn.Module,
)


def situation(module: nn.Module) -> tuple[Any, ...]:
    """Compares equal while hooks, forwards, processors and their closures' numbers are the same."""
    return tuple(_of(part) for part in module.modules())


def _of(part: nn.Module) -> tuple[Any, ...]:
    registry = getattr(part, "_diffusers_hook", None)
    forward = vars(part).get("forward")
    return (
        id(part),
        *(tuple(part._forward_hooks), tuple(part._forward_pre_hooks)),
        id(getattr(part, "processor", None)),
        tuple(getattr(registry, "hooks", ())),
        None if forward is None else (id(forward), *_numbers(forward)),
    )


def _numbers(function: Any) -> Iterator[Any]:
    for value in _held(function) or ():
        if isinstance(value, (bool, int, float, str)):
            yield value


def remembers(module: nn.Module) -> str | None:
    """Which replaced forward holds something that may change from call to call; None without."""
    seen: set[type] = set()
    for name, part in module.named_modules():
        forwards = [vars(part).get("forward")]
        if type(part) not in seen:
            seen.add(type(part))
            forwards.append(type(part).forward)
        for forward in forwards:
            kind = None if forward is None else _changing(forward, 4)
            if kind is not None:
                return (
                    f"the forward of {name or 'it'} was replaced by a function that holds a {kind}, "
                    "which may remember earlier calls"
                )
    return None


def _changing(value: Any, depth: int) -> str | None:
    """The type of something in ``value`` that may change; None if there is none."""
    if isinstance(value, _PLAIN):
        return None
    parts: Any = value if isinstance(value, (tuple, frozenset)) else _held(value)
    if parts is None or depth == 0:
        return type(value).__name__
    return next((kind for part in parts if (kind := _changing(part, depth - 1))), None)


def _held(value: Any) -> tuple[Any, ...] | None:
    """What a function holds; None for anything else."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return ()
    if not isinstance(value, types.FunctionType):
        return None
    if str(value.__globals__.get("__name__", "")).split(".")[0] in KNOWN:
        return ()
    cells = inspect.getclosurevars(value).nonlocals.values()
    return (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())

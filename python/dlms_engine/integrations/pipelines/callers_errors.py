"""Errors of a pipeline's call that another scheduler would not change."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def is_callers(error: Exception, arguments: dict[str, Any]) -> bool:
    """Whether ``error`` came out of a function among ``arguments``, or there was no memory.

    A callback that raises ends the call, as in diffusers: servers cancel requests so.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    known = {code for leaf in pytree.tree_leaves(arguments) for code in _codes(leaf)}
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code in known:
            return True
        step = step.tb_next
    return False


def _codes(value: Any) -> Iterator[types.CodeType]:
    """The code that runs when ``value`` is called; none for classes, tensors and networks."""
    while isinstance(value, functools.partial):
        value = value.func
    if not callable(value) or isinstance(value, (type, Tensor, nn.Module)):
        return
    for function in (value, getattr(value, "__func__", None), type(value).__call__):
        if isinstance(function, types.FunctionType):
            yield function.__code__

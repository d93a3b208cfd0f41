"""A network's modules and outputs: the tap at its bottleneck, its tensor, its first parameter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class FeatureTap:
    """Forward hook that keeps a module's output, one for each thread; copies start empty."""

    def __init__(self) -> None:
        self._held = threading.local()

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._held.value = first_tensor(output)

    @property
    def value(self) -> Tensor | None:
        """Output of this thread's last call."""
        return getattr(self._held, "value", None)

    def keep(self, value: Tensor | None) -> None:
        """Sets this thread's value, where the call was one that no hook sees."""
        self._held.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._held = threading.local()


Work = Callable[[Mapping[str, Tensor], dict[str, Any]], tuple[Tensor, ...]]
"""(tensors by name, conditions) -> new tensors; evaluates a network."""


class Through(Protocol):
    """What a distillation does with the evaluations of a Denoiser while it lasts."""

    @property
    def inside(self) -> bool:
        """Whether this thread is in the middle of such work: then evaluations are part of it."""
        ...

    def __call__(
        self,
        denoiser: Any,
        name: tuple[Any, ...],
        work: Work,
        inputs: dict[str, Tensor],
        conditions: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """``work(inputs, conditions)``, which depends on them, ``name`` and ``denoiser`` alone."""
        ...


class NetworkCalls:
    """What stands between a Denoiser and its network; shallow copies of the Denoiser share it."""

    _outside_graph_keys = True

    def __init__(self, tap: FeatureTap) -> None:
        self.tap = tap
        self.through: Through | None = None

    def as_one(
        self,
        denoiser: Any,
        name: tuple[Any, ...],
        work: Work,
        inputs: dict[str, Tensor],
        conditions: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        """As `Through`; the plain call where there is none."""
        through = self.through
        if through is None or torch.compiler.is_compiling() or through.inside:
            return work(inputs, conditions)
        return through(denoiser, name, work, inputs, conditions)

    def __getstate__(self) -> dict[str, Any]:
        return {"tap": self.tap, "through": None}


class Owner:
    """Dies with the last Denoiser that shares a hook; shallow copies of a Denoiser share it."""


def find_module(network: Any, path: str) -> nn.Module:
    """The module at ``path``, or the only one whose path ends in ``.path``."""
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"features={path!r} needs an nn.Module network, got {type(network).__name__}"
        )
    found = _named_module(network, path)
    if isinstance(found, torch.jit.ScriptModule):
        raise ValueError(
            f"features={path!r} is inside a scripted or traced network, whose modules run without "
            "hooks: wrap the network it was made from, or leave the features out"
        )
    return found


def _named_module(network: nn.Module, path: str) -> nn.Module:
    named: dict[str, nn.Module] = dict(network.named_modules())
    if path in named:
        return named[path]
    ends = [name for name in named if name.endswith("." + path)]
    if len(ends) != 1:
        near = [name for name in named if name.count(".") <= 1 and name][:12]
        raise ValueError(
            f"features={path!r} names {len(ends)} modules of the network, expected one; "
            f"top modules: {near}"
        )
    return named[ends[0]]


def first_tensor(output: Any) -> Tensor | None:
    """The tensor in what a module returned, as ``unwrap`` looks for it; None where there is none."""
    found = _first_entry(output)
    if isinstance(found, Mapping):
        found = found.get("sample", found)
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    return found if isinstance(found, Tensor) else None


def _first_entry(output: Any) -> Any:
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output


def unwrap(output: Any) -> Tensor:
    """The tensor in what a network returned: itself, ``.sample``, ``["sample"]`` or the first of a tuple
    or list.

    Raises:
        TypeError: there is none.
    """
    found = first_tensor(output)
    if found is not None:
        return found
    first = _first_entry(output)
    held = f" that starts with {type(first).__name__}" if first is not output else ""
    raise TypeError(
        f"the network returned {type(output).__name__}{held}, expected a tensor, an object with .sample "
        "or a tuple that starts with one: wrap it in a function that takes the prediction out"
    )


def like_input(output: Tensor, x: Tensor) -> Tensor:
    """``output`` of a network on ``x`` ``[B, ...]``.

    Raises:
        ValueError: it has another shape, which broadcasting would hide, or is no real floating point.
    """
    if output.shape != x.shape:
        raise ValueError(
            f"the network returned {list(output.shape)} for x {list(x.shape)}, expected a tensor like x: "
            "wrap it in a function that takes the prediction out (of one that also learned a variance "
            "the first half of the channels)"
        )
    if not output.is_floating_point():
        raise ValueError(
            f"the network returned {output.dtype}, expected floating point: a prediction is a real number"
        )
    return output


def called(
    network: Callable[..., Any], x: Tensor, times: Tensor, conditions: Mapping[str, Any]
) -> Tensor:
    """The network's tensor at ``x`` ``[B, ...]``; it may write into ``times`` ``[B]``.

    They are numbers of every later run, too: ``t *= 1000`` in a network would change those. A copy is
    next to nothing on the CPU; elsewhere it is a kernel an evaluation, so a change is an error.

    Raises:
        TypeError, ValueError: it is no tensor like ``x``.
        RuntimeError: the network wrote into ``times`` where they are not copied.
    """
    if times.device.type == "cpu" or torch.compiler.is_compiling() or times.is_inference():
        return like_input(unwrap(network(x, times.clone(), **conditions)), x)
    version = times._version
    output = unwrap(network(x, times, **conditions))
    if times._version != version:
        raise RuntimeError(
            "the network writes into its time argument, which later evaluations use: let it work on a "
            "copy (t = t * 1000 in place of t *= 1000)"
        )
    return like_input(output, x)


def no_bottleneck(features: str | None, network: Any = None) -> str:
    """What to say where a denoiser of ``network`` that taps ``features`` has no bottleneck."""
    if features is None:
        return (
            "no bottleneck: construct the Denoiser with features='mid_block' (a module path) and call "
            "it first"
        )
    if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
        return (
            "no bottleneck: torch.compile leaves out hooks that come after the network's first run: make "
            f"the Denoiser with features={features!r} ahead of that, or call torch._dynamo.reset()"
        )
    return (
        "no bottleneck: the network has not been called in this thread, or did not run its module "
        f"{features!r}, or that returned no tensor (nor a tuple that starts with one, nor anything with "
        "a 'sample'): name one that every call runs and that returns a tensor"
    )


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first floating-point parameter; in every run, so not by ``parameters()``, ten times slower.

    Of one byte only where there is no other: weights are stored in float8, and no network's input is.
    """
    found = _first(module, 2)
    return _first(module, 1) if found is None else found


def _first(module: nn.Module, bytes_each: int) -> nn.Parameter | None:
    for parameter in module._parameters.values():
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.dtype.itemsize >= bytes_each:
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first(child, bytes_each)
        if found is not None:
            return found
    return None


def buffer_dtype(module: nn.Module) -> torch.dtype | None:
    """The one dtype of all floating-point buffers, the weights of a network without parameters.

    None for several, and for float32: constants of 32 bits go with inputs of float64, too.
    """
    found = {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()}
    only = found.pop() if len(found) == 1 else None
    return only if only in (torch.float16, torch.bfloat16, torch.float64) else None

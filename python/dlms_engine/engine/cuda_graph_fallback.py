"""Captured runs where the compiled part is absent: torch's own replay, keys and cache in Python.

The meaning is that of ``csrc/cuda`` and ``csrc/python/graph_key.cpp``, at several hundred microseconds
a run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class PythonKey(NamedTuple):
    """As ``_C.GraphKey``."""

    owner: int
    coarse: tuple[Any, ...]
    modules: tuple[Any, ...]


def _settings(value: Any, tensors: bool, depth: int = 0) -> Any:
    """A hashable picture of an attribute."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return type(value), value  # 1, 1.0 and True are equal
    if isinstance(value, (torch.dtype, torch.device, FunctionType, BuiltinFunctionType, type)):
        return value
    if isinstance(value, Tensor):
        return _place(value) if tensors else None
    if depth < 6 and isinstance(value, (tuple, list)):
        return tuple(_settings(v, tensors, depth + 1) for v in value)
    if depth < 6 and isinstance(value, Mapping):
        return tuple(
            (_settings(k, tensors, depth + 1), _settings(v, tensors, depth + 1))
            for k, v in value.items()
        )
    if isinstance(value, (set, frozenset, deque, complex, range, slice, bytearray)):
        return type(value), repr(value)
    if type(value).__module__.startswith("numpy") and hasattr(value, "tobytes"):
        return type(value), value.shape, str(value.dtype), value.tobytes()
    if hasattr(type(value), "_outside_graph_keys"):
        return type(value)
    if depth < 2 and not type(value).__module__.startswith(("torch", "builtins", "_")):
        return type(value), _settings(attributes(value), tensors, depth + 1)
    return type(value)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how: a view of the same memory may have other sizes.

    A graph has frozen a number that lies on the host, unless its memory was given back.
    """
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    at = tensor.data_ptr()
    number = tensor.item() if tensor.ndim == 0 and tensor.device.type == "cpu" and at else None
    return at, tensor.shape, strides, tensor.dtype, number


def attributes(value: Any) -> dict[str, Any]:
    """Of its dict, of ``__slots__``, and the fields of an object made in C."""
    names = {
        name
        for base in type(value).__mro__
        for name, item in vars(base).items()
        if isinstance(item, MemberDescriptorType) and not name.startswith("__")
    }
    fields = {name: getattr(value, name, None) for name in sorted(names)}
    held = getattr(value, "__dict__", None)
    return {**fields, **(held if isinstance(held, dict) else {})}


def _picture(module: nn.Module, tensors: bool) -> Iterator[Any]:
    for child in module.modules():
        yield type(child)
        for name, value in vars(child).items():
            if name in ("_parameters", "_buffers"):
                yield tuple((k, _settings(v, True)) for k, v in value.items())
            elif name != "_modules" and not name.startswith(
                ("_state_dict", "_load_state", "_back")
            ):
                yield name, _settings(value, tensors)


def python_key(
    owner: int,
    inputs: Mapping[str, Tensor],
    options: tuple[Any, ...],
    modules: tuple[Any, ...],
    tensor_attributes: bool = True,
) -> tuple[PythonKey, str]:
    """As ``_C.graph_key``."""
    device = next(iter(inputs.values())).device
    described = tuple((k, tuple(t.shape), t.dtype, str(t.device)) for k, t in inputs.items())
    pictures: list[Any] = []
    stray = ""
    for item in modules:
        if isinstance(item, nn.Module):
            pictures.extend(_picture(item, tensor_attributes))
            if item is modules[0]:
                away = (n for n, p in item.named_parameters() if p.device != device)
                stray = next(away, "")
        else:
            pictures.append(_settings(item, tensor_attributes))
            for value in getattr(item, "__dict__", {}).values():
                if isinstance(value, nn.Module):
                    pictures.extend(_picture(value, tensor_attributes))
    coarse = (owner, described, _settings(options, True))
    return PythonKey(owner, coarse, tuple(pictures)), stray


class TorchRun:
    """As ``_C.GraphRun``, by ``torch.cuda.CUDAGraph.replay``."""

    def __init__(self, graph: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._graph = graph
        self._inputs = inputs
        self._output = output
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()
        graph.instantiate()

    def launch(self, inputs: tuple[Tensor, ...], output: Tensor, stream: int) -> None:
        """One run on torch's current stream, which `stream` is."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            torch.cuda.current_stream(output.device).wait_event(self._done)
            for buffer, value in zip(self._inputs, inputs, strict=True):
                buffer.copy_(value, non_blocking=True)
            self._graph.replay()
            output.copy_(self._output)
            self._done.record(torch.cuda.current_stream(output.device))

    def upload(self, stream: int) -> None:
        """Torch uploads with the first run."""


class _Entry(NamedTuple):
    value: Any
    nbytes: int
    owner: int


class PythonCache:
    """As ``_C.GraphCache``."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self.set_bounds(max_bytes, max_entries)
        self._entries: OrderedDict[PythonKey, _Entry] = OrderedDict()
        self._failures: OrderedDict[Any, tuple[int, str]] = OrderedDict()
        self._making: dict[Any, bool] = {}  # by coarse key: invalidated meanwhile
        self._seconds: dict[PythonKey, tuple[float, float]] = {}
        self._counts = {"captures": 0, "replays": 0, "evictions": 0, "failures": 0}
        self._changed = threading.Condition(threading.RLock())

    def set_bounds(self, max_bytes: int, max_entries: int) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        if hasattr(self, "_changed"):
            with self._changed:
                self._evict()

    def find(self, key: PythonKey) -> Any:
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            self._counts["replays"] += 1
            return entry.value

    def claim(self, key: PythonKey) -> tuple[str, Any, str]:
        with self._changed:
            value = self.find(key)
            if value is not None:
                return "found", value, ""
            reason = self.failure(key)
            if reason:
                return "failed", None, reason
            if key.coarse not in self._making:
                self._making[key.coarse] = False
                return "mine", None, ""
            self._changed.wait_for(lambda: key.coarse not in self._making)
            return "again", None, ""

    def put(self, claimed: PythonKey, key: PythonKey, value: Any, nbytes: int) -> None:
        with self._changed:
            self._counts["captures"] += 1
            if not self._making.pop(claimed.coarse, False):
                self._entries[key] = _Entry(value, nbytes, key.owner)
                self._entries.move_to_end(key)
                self._evict()
            self._changed.notify_all()

    def _evict(self) -> None:
        while len(self._entries) > 1 and (
            len(self._entries) > self.max_entries
            or sum(e.nbytes for e in self._entries.values()) > self.max_bytes
        ):
            self._entries.popitem(last=False)
            self._counts["evictions"] += 1

    def fail(self, claimed: PythonKey, reason: str, coarse: bool) -> None:
        with self._changed:
            self._making.pop(claimed.coarse, None)
            self._failures[claimed.coarse if coarse else claimed] = claimed.owner, reason
            self._counts["failures"] += 1
            while len(self._failures) > 8 * self.max_entries:
                self._failures.popitem(last=False)
            self._changed.notify_all()

    def release(self, claimed: PythonKey) -> None:
        with self._changed:
            self._making.pop(claimed.coarse, None)
            self._changed.notify_all()

    def measured(self, key: PythonKey, plain_seconds: float, graph_seconds: float) -> None:
        with self._changed:
            self._seconds[key] = plain_seconds, graph_seconds

    def contains(self, key: PythonKey) -> bool:
        return key in self._entries

    def failure(self, key: PythonKey) -> str:
        with self._changed:
            found = self._failures.get(key) or self._failures.get(key.coarse)
            return found[1] if found else ""

    def invalidate(self, owner: int) -> None:
        with self._changed:
            self._making = {k: stale or owner in (0, k[0]) for k, stale in self._making.items()}
            for key in [k for k in self._entries if owner in (0, k.owner)]:
                del self._entries[key]
            for key in [k for k, (by, _) in self._failures.items() if owner in (0, by)]:
                del self._failures[key]

    def stats(self) -> dict[str, Any]:
        with self._changed:
            seconds = [s for k, s in self._seconds.items() if k in self._entries]
            graph = sum(g for _, g in seconds)
            return {
                **self._counts,
                "entries": len(self._entries),
                "bytes": sum(e.nbytes for e in self._entries.values()),
                "gain": sum(p for p, _ in seconds) / graph if graph else None,
            }

"""Bookkeeping of captured CUDA graphs: when two runs share a graph, and which graphs to keep.

Nothing here touches a GPU.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

DEFAULT_MAX_BYTES = 4 << 30
DEFAULT_MAX_ENTRIES = 8


class Entry(Protocol):
    """What the cache keeps: it must tell the device memory it holds."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class GraphKey:
    """Two runs with equal keys may replay one graph; values of the inputs are copied, not keyed."""

    network: tuple[int, ...]
    inputs: tuple[tuple[str, tuple[int, ...], torch.dtype, str], ...]
    options: tuple[Any, ...]


_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
_tokens: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_counter = itertools.count(1)
_tokens_lock = threading.Lock()


def identity(network: Any) -> tuple[int, ...]:
    """A key that changes whenever a captured graph of `network` would be wrong.

    A number of its own for each live object (an `id` is reused after the object is gone), and for a
    module also where its parameters and buffers lie and whether it trains: `.to()` or new weights
    move them, and a graph would go on reading the old memory. In-place updates keep the key, as the
    graph sees them.
    """
    with _tokens_lock:
        token = _tokens.get(network)
        if token is None:
            token = _tokens[network] = next(_counter)
    if not isinstance(network, nn.Module):
        return (token,)
    tensors = itertools.chain(network.parameters(), network.buffers())
    places = tuple((t.data_ptr(), t.dtype) for t in tensors)
    modes = tuple(module.training for module in network.modules())
    return (token, hash(places), hash(modes))


def graph_key(
    network: Any, inputs: Mapping[str, Tensor], options: tuple[Any, ...] = ()
) -> GraphKey:
    """The key of a run of `network` on `inputs`; `options` is whatever else the body depends on."""
    described = tuple(
        (name, tuple(t.shape), t.dtype, str(t.device)) for name, t in sorted(inputs.items())
    )
    cuda_half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return GraphKey(identity(network), described, (*options, cuda_half))


def split_tensors(
    tree: Any, prefix: str = "cond"
) -> tuple[dict[str, Tensor], tuple[Any, ...], Callable[[Mapping[str, Tensor]], Any]]:
    """(tensors by name, a key of the rest, what puts `tree` together again from the tensors).

    Tensors inside dicts, lists and tuples are found. The rest is keyed by value where it is a
    number, a text or None, and elsewhere as the object that it is.
    """
    leaves, spec = tree_flatten(tree)
    tensors = {f"{prefix}/{i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
    rest = tuple(
        "tensor"
        if isinstance(v, Tensor)
        else (type(v), v)
        if isinstance(v, _PLAIN)
        else identity(v)
        for v in leaves
    )

    def rebuild(given: Mapping[str, Tensor]) -> Any:
        return tree_unflatten([given.get(f"{prefix}/{i}", v) for i, v in enumerate(leaves)], spec)

    return tensors, (str(spec), *rest), rebuild


class GraphCache:
    """Least recently used graphs go first when the bounds are passed. Safe to share among threads.

    A key that failed is remembered with its reason, so that it is not tried again on every run.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_MAX_BYTES, max_entries: int = DEFAULT_MAX_ENTRIES
    ) -> None:
        if max_bytes < 0 or max_entries < 1:
            raise ValueError(
                f"max_bytes is {max_bytes} and max_entries {max_entries}, expected >= 0 and >= 1"
            )
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self._entries: OrderedDict[GraphKey, Entry] = OrderedDict()
        self._failures: OrderedDict[GraphKey, str] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    @property
    def nbytes(self) -> int:
        """Device memory that the kept graphs hold."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def get(self, key: GraphKey, make: Callable[[], Entry]) -> Entry:
        """The entry of `key`, made by `make()` if it is not there.

        Captures are made one at a time: while one runs, other threads that need another wait. An
        entry larger than `max_bytes` on its own is returned but not kept.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = make()
                self._entries[key] = entry
            self._entries.move_to_end(key)
            self._evict()
            return entry

    def _evict(self) -> None:
        def too_much() -> bool:
            return len(self._entries) > self.max_entries or self.nbytes > self.max_bytes

        while self._entries and too_much():
            self._entries.popitem(last=False)

    def fail(self, key: GraphKey, reason: str) -> None:
        """Remember that `key` cannot be captured."""
        with self._lock:
            self._failures[key] = reason
            while len(self._failures) > 8 * self.max_entries:
                self._failures.popitem(last=False)

    def failure(self, key: GraphKey) -> str | None:
        """Why `key` could not be captured, or None."""
        with self._lock:
            return self._failures.get(key)

    def clear(self) -> None:
        """Drop every graph and every failure."""
        with self._lock:
            self._entries.clear()
            self._failures.clear()

    # A graph belongs to this process and to these buffers: a copy starts empty.
    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes, "max_entries": self.max_entries}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache(self.max_bytes, self.max_entries)

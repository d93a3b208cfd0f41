"""Bookkeeping of captured CUDA graphs: when two runs share a graph, and which graphs to keep.

Nothing here touches a GPU.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..support.forks import per_process
from .cuda_graph_fallback import PythonCache, attributes, python_key
from .native import native

LoopMode = Literal["never", "always", "auto"]
DEFAULT_MAX_BYTES = 4 << 30
DEFAULT_MAX_ENTRIES = 8

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
_tokens: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_counter = itertools.count(1)
_tokens_lock = threading.Lock()
# Networks that keep a new tensor as an attribute in every call; such tensors are left out of keys.
_restless: weakref.WeakSet[Any] = weakref.WeakSet()


# In a forked child: destroying a parent's graphs would use a driver that is not initialised there.
_parents: list[Any] = []


def _make_runs(max_bytes: int, max_entries: int) -> Any:
    return (PythonCache if native is None else native.GraphCache)(max_bytes, max_entries)


class _Locks:
    """The module's own."""

    def renew(self) -> None:
        global _tokens_lock
        _tokens_lock = threading.Lock()


_LOCKS = _Locks()
per_process(_LOCKS)


def token(subject: Any) -> int:
    """A number of its own for each live object; an `id` is reused after the object is gone."""
    number = _tokens.get(subject)
    if number is None:
        with _tokens_lock:
            number = _tokens.get(subject)
            if number is None:
                number = _tokens[subject] = next(_counter)
    return number


def _modes() -> tuple[Any, ...]:
    """What outside of the network changes the kernels that a run launches."""
    precision = torch._C._get_fp32_precision_getter
    every_module = torch.nn.modules.module
    return (
        every_module._global_forward_pre_hooks,
        every_module._global_forward_hooks,
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        precision("cuda", "matmul"),
        precision("cuda", "conv"),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def _scripted(owner: Any) -> tuple[Any, ...]:
    """What a scripted or traced network, or part of a network, holds: its attributes do not show it."""
    network = getattr(owner, "network", owner)
    parts = getattr(network, "__dict__", {}).get("_modules")
    children = parts.values() if isinstance(parts, dict) else ()
    return tuple(
        (
            id(part),
            getattr(part, "training", None),
            *((t.data_ptr(), t.shape, t.dtype) for t in (*part.parameters(), *part.buffers())),
        )
        for part in (network, *children)
        if isinstance(part, torch.jit.ScriptModule)
    )


def graph_key(
    network: Any,
    inputs: Mapping[str, Tensor],
    options: tuple[Any, ...] = (),
    modules: tuple[Any, ...] = (),
    tensor_attributes: bool | None = None,
) -> tuple[Any, str]:
    """The key of a run: two runs with equal keys may replay one graph.

    Seen are the shapes, dtypes and devices of `inputs` (their values are copied in); `options`;
    precision and autocast modes; and of `network` and `modules`, with all that they contain, where
    parameters, buffers and other tensors lie and with which sizes, plain attributes (numbers, texts,
    containers of them: LoRA scales, active adapters, FreeU), hooks, attention processors and other
    objects with their plain attributes. In-place updates of tensors keep the key, as the graph sees
    them; single numbers on the CPU, which kernels get as arguments, count by value.

    Args:
        network: owner of the graph; ``GraphCache.invalidate(network)`` drops it.
        inputs: tensors by name, the state first.
        options: whatever else the run depends on: plain values, tuples of them, dtypes.
        modules: more objects that the run depends on.
        tensor_attributes: whether tensors that are plain attributes count; by default, but for
            networks that keep a new one in every run.

    Returns:
        The key, and the path of a parameter that is not on the state's device, or "".
    """
    make = python_key if native is None else native.graph_key
    answer: tuple[Any, str] = make(
        token(network),
        inputs if isinstance(inputs, dict) else dict(inputs),
        (options, _modes(), _scripted(network)),
        (network, *modules),
        network not in _restless if tensor_attributes is None else tensor_attributes,
    )
    return answer


def ignore_tensor_attributes(network: Any) -> None:
    """Leaves out of the keys of `network` the tensors that its modules keep as plain attributes."""
    _restless.add(network)


def _described(value: Any) -> tuple[Any, ...]:
    """What tells a condition from others; of an object itself and its attributes."""
    if isinstance(value, Tensor):
        return ("tensor",)
    kind = str(type(value))
    if isinstance(value, _PLAIN):
        return kind, value
    fields = attributes(value)
    try:
        return kind, token(value), fields, value
    except TypeError:  # not hashable, or without weak references
        return kind, None if fields else repr(value), fields, value


def split_tensors(
    tree: Any, prefix: str = "cond"
) -> tuple[dict[str, Tensor], tuple[Any, ...], Callable[[Mapping[str, Tensor]], Any]]:
    """(tensors by name, a key of the rest, what puts `tree` together again from the tensors).

    Tensors inside dicts, lists and tuples are found. The rest is keyed by value where it is a
    number, a text or None, and elsewhere as the object that it is, with what it holds.
    """
    if not tree:
        return {}, (), lambda given: tree
    leaves, spec = tree_flatten(tree)
    tensors = {f"{prefix}/{i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
    rest = itertools.chain.from_iterable(map(_described, leaves))

    def rebuild(given: Mapping[str, Tensor]) -> Any:
        return tree_unflatten([given.get(f"{prefix}/{i}", v) for i, v in enumerate(leaves)], spec)

    return tensors, (str(spec), *rest), rebuild


class GraphCache:
    """Captured runs by key, in C++; the least recently used go first when a bound is passed.

    Safe to share among threads, which may look up and run graphs while another captures. The newest
    graph stays, whatever its size. A key that failed is remembered with its reason.

    Args:
        max_bytes: device memory that the kept graphs may hold together.
        max_entries: graphs kept.
        verify: every ``verify``-th run of a graph is also run plainly and compared; 0 is never. For
            finding out whether something that the key does not see has changed: a difference raises
            ``StaleGraphError``.
        loop: whether a table's run is captured as one evaluation under a WHILE node, which serves any
            number of evaluations: ``"never"`` unrolls, one capture for each number; ``"always"``;
            ``"auto"`` captures both and keeps the faster. Experimental: not yet seen right on a GPU.
    """

    def __init__(
        self,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_entries: int = DEFAULT_MAX_ENTRIES,
        verify: int = 0,
        loop: LoopMode = "never",
    ) -> None:
        if max_bytes < 0 or max_entries < 1 or verify < 0:
            raise ValueError(
                f"max_bytes is {max_bytes}, max_entries {max_entries} and verify {verify}, expected "
                ">= 0, >= 1 and >= 0"
            )
        self.runs: Any = _make_runs(max_bytes, max_entries)
        if loop not in ("never", "always", "auto"):
            raise ValueError(f"loop is {loop!r}, expected 'never', 'always' or 'auto'")
        self.verify = verify
        self.loop: LoopMode = loop
        self._bounds = max_bytes, max_entries
        per_process(self)

    def renew(self) -> None:
        """Empty, in a forked child: the graphs are those of the parent's context, and stay its own."""
        _parents.append(self.runs)
        self.runs = _make_runs(*self._bounds)

    def __len__(self) -> int:
        return int(self.stats()["entries"])

    def __contains__(self, key: Any) -> bool:
        return bool(self.runs.contains(key))

    @property
    def nbytes(self) -> int:
        """Device memory that the kept graphs hold, as the allocator counts it."""
        return int(self.stats()["bytes"])

    @property
    def max_bytes(self) -> int:
        return int(self.runs.max_bytes)

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._set_bounds(value, self.max_entries)

    @property
    def max_entries(self) -> int:
        return int(self.runs.max_entries)

    @max_entries.setter
    def max_entries(self, value: int) -> None:
        self._set_bounds(self.max_bytes, value)

    def _set_bounds(self, max_bytes: int, max_entries: int) -> None:
        self.runs.set_bounds(max_bytes, max_entries)
        self._bounds = max_bytes, max_entries

    def stats(self) -> dict[str, Any]:
        """``captures``, ``replays``, ``evictions``, ``failures`` so far; ``entries`` and ``bytes`` now.

        ``gain``: time of the plain loop over that of the graph, measured once at each capture and
        summed over the graphs that are kept; None before the first.
        """
        return dict(self.runs.stats())

    def failure(self, key: Any) -> str | None:
        """Why `key` could not be captured, or None."""
        return self.runs.failure(key) or None

    def invalidate(self, network: Any = None) -> None:
        """Drops the graphs of `network` (None: of every network) and what is known of failures.

        `network` is a denoiser, or the network inside of denoisers: the graphs of all of them go.
        To be called after a change that the key cannot see (``graph_key`` lists what it sees): a
        Python global, an object inside an object inside a module, code that was replaced in place.
        """
        if network is None:
            return self.clear()
        with _tokens_lock:
            known = list(_tokens.items())
        for owner, number in known:
            if owner is network or getattr(owner, "network", None) is network:
                self.runs.invalidate(number)

    def clear(self) -> None:
        """Drop every graph and every failure."""
        self.runs.invalidate(0)

    # A graph belongs to this process and to these buffers: a copy starts empty.
    def __getstate__(self) -> dict[str, Any]:
        return {
            "max_bytes": self.max_bytes,
            "max_entries": self.max_entries,
            "verify": self.verify,
            "loop": self.loop,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache(**self.__getstate__())

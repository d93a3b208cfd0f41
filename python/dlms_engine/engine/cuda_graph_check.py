"""What a CUDA graph cannot record, found before a capture is tried, and named.

A capture that fails can leave torch's allocator and random generators in the capturing state.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class GraphCaptureError(RuntimeError):
    """The run cannot be captured as a CUDA graph; the message says why and what to do."""


HOST_READ = (
    "it makes the host wait for the GPU: look for .item(), .cpu(), .tolist(), nonzero, a Python `if` "
    "on a tensor's value, or a print of one"
)
HOST_COPY = "it copies from CPU memory: make such tensors once, on the GPU, before the run"
RANDOM = "it draws random numbers, which a graph would repeat: make the network deterministic (eval mode)"

_REASONS = (
    (
        ("unsafe", "not permitted when stream is capturing", "capture unsupported", "is capturing"),
        HOST_READ,
    ),
    (("copy between cpu and cuda", "pin_memory", "pinned"), HOST_COPY),
    (("generator", "philox", "offset increment"), RANDOM),
    (
        ("out of memory",),
        "the captured run does not fit the GPU's memory: lower the batch size",
    ),
)


def explain(exc: BaseException) -> str:
    """In words, why a capture failed with `exc`.

    The error that ends a capture often hides the one that broke it, so that one is read too.
    """
    chain = [exc]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(earlier)
    text = "\n".join(str(e) for e in chain).lower()
    for fragments, reason in _REASONS:
        if any(fragment in text for fragment in fragments):
            return reason
    first = (str(chain[-1]).strip() or "no message").splitlines()[0]
    return f"it failed with {type(chain[-1]).__name__}: {first}"


def _calling_module(network: Any) -> str:
    """The innermost module of `network` on this thread's call stack, for messages."""
    names = {}
    if isinstance(network, nn.Module):
        names = {id(module): name for name, module in network.named_modules()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return f"{names[id(owner)] or 'the network'} ({type(owner).__name__})"
        frame = frame.f_back
    return "the network"


class CaptureCheck(TorchDispatchMode):
    """Raises ``GraphCaptureError``, naming operation and module, where a capture would go wrong.

    Found are reads of a value by the host, copies between the host and ``device``, and random numbers.
    Operations that involve the host alone are left alone.
    """

    def __init__(self, device: torch.device, network: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._network = network

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.device == self._device for t in given)
        if on_device and _reads_values(func, given, kwargs):
            raise self._error(func, HOST_READ)
        before = self._generator_state(func)
        out = func(*args, **kwargs)
        if before is not None and before != self._generator_state(func):
            raise self._error(func, RANDOM)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if self._crosses(func, given, made):
            to_host = any(t.device.type == "cpu" for t in made)
            raise self._error(func, HOST_READ if to_host else HOST_COPY)
        return out

    def _error(self, func: Any, reason: str) -> GraphCaptureError:
        where = _calling_module(self._network)
        return GraphCaptureError(f"{func} in {where} cannot be captured: {reason}")

    def _generator_state(self, func: Any) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        return generator_states(self._device)

    def _crosses(self, func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether data goes between host and device.

        A CPU scalar in arithmetic is an argument of the kernel, as a Python number is: no copy.
        """
        kinds = {t.device.type for t in (*given, *made)}
        if self._device.type not in kinds or "cpu" not in kinds or self._device.type == "cpu":
            return False
        scalars = all(t.ndim == 0 for t in (*given, *made) if t.device.type == "cpu")
        return not scalars or "copy" in str(func)


def _reads_values(func: Any, given: list[Tensor], kwargs: Mapping[str, Any]) -> bool:
    name = func.name()
    if name.startswith(
        "aten::index"
    ):  # by numbers it reads nothing, by a mask the shape depends on it
        scalar = name.startswith("aten::index_put") and given[-1].numel() == 1  # a masked fill
        return not scalar and any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
    if torch.Tag.data_dependent_output in func.tags:
        return True
    return torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None


def generator_states(device: torch.device) -> tuple[Any, ...]:
    """Where torch's default random generators stand: the CPU's, and the device's."""
    return torch.get_rng_state().numpy().tobytes(), device_offset(device)


def device_offset(device: torch.device) -> int:
    """How far the device's default random generator has come."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.default_generators[device_index(device)].get_offset())


def device_index(device: torch.device) -> int:
    """The number of a CUDA device; of the current one where it has none."""
    return torch.cuda.current_device() if device.index is None else device.index

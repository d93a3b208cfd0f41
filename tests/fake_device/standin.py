"""A stand-in GPU that computes: tensors say "gpu", their numbers lie on the CPU.

``FakeTensorMode`` has tensors on "gpu" without a GPU, but no numbers, so a host read ends the run. Here
every operation is done, on the CPU, under the rules that a GPU has: what mixes devices raises, and so
does every read by the host that is not allowed by name. A path that passes has computed the same as on
the CPU, bit for bit, and read from the device where ``ALLOWED`` says so and nowhere else.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.backend_registration
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,  # item(), float(), int(), bool()
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
"""Operations that make the host wait for a number, a shape or a decision."""


class BrokenRules(AssertionError):
    """The host read from the device where nothing allows it, or an operation mixed devices."""


class DeviceTensor(Tensor):
    """A tensor that says it is on "gpu"; ``numbers`` holds its numbers on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> DeviceTensor:
        outer = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=device,
            requires_grad=False,
        )
        outer.numbers = numbers
        return outer

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.numbers}, {self.device})"

    def __float__(self) -> float:  # torch's own asks for the device's driver
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    __index__ = __int__

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the stand-in device")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class StandInDevice(TorchDispatchMode):
    """While it is entered, devices "gpu:0" exists; bare "gpu" is "gpu:0".

    Args:
        allowed: names of functions of the package under which the host may read.
    """

    def __init__(self, allowed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.allowed = allowed
        self.reads: Counter[str] = Counter()
        """Allowed reads so far, by the function that allows them."""
        self.operations = 0
        """Operations done on the device."""
        self.wrong: list[str] = []
        """What broke the rules; not raised on the spot, where a backward pass would end the process."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # what autograd would have taken apart elsewhere
                return func.decompose(*args, **kwargs)
        leaves = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        places = {a.device for a in leaves if isinstance(a, DeviceTensor)}
        target = kwargs.get("device")
        target = None if target is None else _numbered(torch.device(target))
        if not places and (target is None or target.type != "gpu"):
            return func(*args, **kwargs)
        self.operations += 1
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if len(places) > 1 and not copies:
            self._refuse(f"{func} was given tensors on {sorted(map(str, places))}")
        here = next(iter(places), None)
        host = [a for a in leaves if not isinstance(a, DeviceTensor) and a.ndim > 0]
        if here is not None and host and not copies:
            self._refuse(f"{func} on {here} was given a CPU tensor {tuple(host[0].shape)}")
        if func in READS or (copies and _leaves_device(func, args, target)):
            self._read(func)
        place = args[0].device if func is aten.copy_.default else (target or here)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(lambda a: a.numbers if isinstance(a, DeviceTensor) else a, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if func is aten._to_copy.default and target is not None and target != here:
            out = out.clone() if out is plain[0][0] else out
        return self._wrap(out, leaves, plain, place)

    def _wrap(self, out: Any, leaves: list[Tensor], plain: Any, place: torch.device) -> Any:
        """Results on the device; one that is an argument (in-place, out=) stays that argument."""
        known = {id(a.numbers): a for a in leaves if isinstance(a, DeviceTensor)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            if place.type == "cpu":
                return value
            with torch.inference_mode(False):  # a wrapper counts its versions, its numbers need not
                return DeviceTensor(value, place)

        return tree_map(wrap, out)

    def _read(self, func: Any) -> None:
        for name in _functions():
            if name in self.allowed:
                self.reads[name] += 1
                return
        self._refuse(f"{func} reads from the device")

    def _refuse(self, what: str) -> None:
        self.wrong.append(f"{what} under {' < '.join(_functions())}")


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among arguments, which are values and lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _numbered(device: torch.device) -> torch.device:
    return torch.device("gpu", 0) if device.type == "gpu" and device.index is None else device


def _leaves_device(func: Any, args: Any, target: torch.device | None) -> bool:
    """Whether a copy brings numbers from the device to the host."""
    if func is aten.copy_.default:
        return isinstance(args[1], DeviceTensor) and not isinstance(args[0], DeviceTensor)
    return isinstance(args[0], DeviceTensor) and target is not None and target.type == "cpu"


def _functions() -> Iterator[str]:
    """Qualified names of the package's functions on the stack, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("dlms_engine"):
            yield f"{module.removeprefix('dlms_engine.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]


class _Module(torch.utils.backend_registration._DummyBackendModule):
    """``torch.gpu``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, _device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # random numbers are drawn on the CPU

    def set_rng_state(self, _state: Tensor, _device: Any = None) -> None:
        return None


def register() -> None:
    """Makes "gpu" a device of this process, for good."""
    registration = torch.utils.backend_registration
    registration._setup_privateuseone_for_python_backend("gpu", _Module())
    for name in ("conv2d", "linear"):
        _autocast.impl(name, _in_half(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    _others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


_autocast = torch.library.Library("aten", "IMPL")
_others = torch.library.Library("_", "IMPL")


def _in_half(operation: Any) -> Any:
    """``operation`` as it runs under autocast."""

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype("gpu")
        with torch.autocast("gpu", enabled=False):
            return operation(*(a.to(dtype) if isinstance(a, Tensor) else a for a in args))

    return run


@contextlib.contextmanager
def standin(*allowed: str) -> Iterator[StandInDevice]:
    """The stand-in device; leaving it raises what broke its rules."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="gpu") comes here too
    try:
        with (
            StandInDevice(frozenset(allowed)) as device,
            # It stops by raising, and no exception survives autograd's thread of this device.
            torch.utils.checkpoint.set_checkpoint_early_stop(False),
        ):
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    if device.wrong:
        raise BrokenRules("\n".join(dict.fromkeys(device.wrong)))

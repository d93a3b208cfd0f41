"""Which implementations of the fused row there are, and the choice among them.

An explicit choice that cannot be had raises `BackendUnavailable`; "auto" takes the best one for the
device and falls back to eager torch, saying so once. A new implementation calls `register_backend`
from `dlms_engine.kernels.register`, which `dlms_engine.ops` runs on import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference

BACKENDS = ("auto", "eager", "cpu", "cuda", "triton")
log = logging.getLogger("dlms_engine")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot be had here."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the three operators, with the signatures of `ops.reference`.

    `device_types` are the devices whose tensors it takes, () for any. Of the backends that fit,
    "auto" takes the one with the highest `rank`. `in_loop` is `fused_row_` without autograd's
    book-keeping, where it has one.
    """

    name: str
    device_types: tuple[str, ...]
    rank: int
    fused_row: Callable[..., Any]
    fused_row_: Callable[..., Any]
    fused_row_backward: Callable[..., Any]
    in_loop: Callable[..., Any] | None = None

    def __call__(
        self,
        f: Tensor,
        f_cond: Tensor | None,
        x: Tensor,
        ring: Tensor,
        row: Tensor,
        network_input: Tensor,
    ) -> None:
        """The in-place row on buffers of the caller's own: what a sampling loop calls.

        Versions of the tensors are not counted and gradients are not looked at, as in `fused_row_`.
        """
        (self.in_loop or self.fused_row_)(f, f_cond, x, ring, row, network_input)

    def takes(self, device_type: str) -> bool:
        """Whether tensors on `device_type` ("cpu", "cuda", ...) can be given to this backend."""
        return not self.device_types or device_type in self.device_types


_backends: dict[str, Backend] = {}
_best_first: list[Backend] = []  # the same, sorted once: a run asks several times
_missing: dict[str, str] = {}
_warned: set[str] = set()


def register_backend(backend: Backend) -> None:
    """Make `backend` available under its name, in place of one registered before."""
    if backend.name not in BACKENDS[1:]:
        raise ValueError(f"backend name is {backend.name!r}, expected one of {BACKENDS[1:]}")
    _backends[backend.name] = backend
    _best_first[:] = sorted(_backends.values(), key=lambda b: -b.rank)
    _missing.pop(backend.name, None)


def mark_missing(name: str, reason: str) -> None:
    """Remember why `name` is not here, for the error raised when it is selected."""
    if name not in _backends:
        _missing[name] = reason


def available(device: torch.device | str | None = None) -> tuple[str, ...]:
    """Names of the available backends, best first; for tensors on `device` if given."""
    if device is None:
        return tuple(b.name for b in _best_first)
    kind = torch.device(device).type
    return tuple(b.name for b in _best_first if b.takes(kind))


def select(name: str = "auto", device: torch.device | str | None = None) -> Backend:
    """The backend called `name` for tensors on `device`, or the best one for "auto".

    Without a device an explicit name is only checked to exist, and "auto" is the best for the CPU.
    Raises ValueError for an unknown name and BackendUnavailable for one that cannot be had.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "auto":
        kind = torch.device(device or "cpu").type
        chosen = next(b for b in _best_first if b.takes(kind))
        if chosen.name == "eager":
            _tell_fallback(kind)
        return chosen
    if name not in _backends:
        reason = _missing.get(name, "it is not part of this installation")
        raise BackendUnavailable(f"backend {name!r}: {reason}; pass backend='auto' or 'eager'")
    if device is not None and not _backends[name].takes(torch.device(device).type):
        raise BackendUnavailable(
            f"backend {name!r} takes tensors on {', '.join(_backends[name].device_types)}, "
            f"not on {torch.device(device).type}; available there: {', '.join(available(device))}"
        )
    return _backends[name]


def advice(kind: str) -> str:
    """What to do where tensors on ``kind`` ("cpu", "cuda", ...) have no compiled backend; may be "".

    "" where there is none for this kind of device, so that nothing is missing.
    """
    if kind not in ("cpu", "cuda"):
        return ""
    compiler = " and a C++17 compiler (g++, clang++)" if kind == "cpu" else ""
    return f"reinstall dlms_engine where torch >= 2.11{compiler} is available; `dlms doctor` shows more"


def missing(name: str) -> str:
    """Why the backend ``name`` cannot be had, "" if it can."""
    return _missing.get(name, "")


def _tell_fallback(kind: str) -> None:
    if kind in _warned:
        return
    _warned.add(kind)
    reasons = "; ".join(f"{name}: {why}" for name, why in _missing.items())
    # Many times slower than what was meant to be installed: that must be seen without asking.
    level = logging.WARNING if advice(kind) else logging.INFO
    log.log(
        level,
        "no compiled backend for %s tensors, running eager torch (%s)%s",
        kind,
        reasons,
        f"; {advice(kind)}" if advice(kind) else "",
    )


register_backend(
    Backend(
        name="eager",
        device_types=(),
        rank=0,
        fused_row=reference.fused_row,
        fused_row_=reference.fused_row_,
        fused_row_backward=reference.fused_row_backward,
    )
)

"""EDM's network snapshots as its training script writes them."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn

SOURCE = "raise SystemExit('the source stored in the snapshot was executed')"


class Persistent:
    """Pickles as the persistence decorator does: a call with class name, source and state."""

    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        meta = EasyDict(
            type="class", version=6, module_src=SOURCE, class_name=self.kind, state=self.state
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class EasyDict(dict):
    """Stand-in of dnnlib.EasyDict."""


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


@pytest.fixture(autouse=True)
def writers(monkeypatch: pytest.MonkeyPatch) -> None:
    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("the reader must not import this")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules["dnnlib.util"].EasyDict = EasyDict


def as_pickled(module: nn.Module, settings: dict[str, Any] | None = None) -> Any:
    """``module`` as the tree of objects a snapshot holds."""
    children = {k: as_pickled(v) for k, v in module._modules.items() if v is not None}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules.update(children)  # type: ignore[arg-type]
        return container
    state = {
        "training": False,
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": children,
        "_init_args": (),
        "_init_kwargs": EasyDict(settings or {}),
    }
    return Persistent(type(module).__name__, state)


def snapshot_bytes(network: nn.Module, settings: dict[str, Any]) -> bytes:
    outer = {
        "_parameters": {},
        "_buffers": {},
        "_modules": {"model": as_pickled(network, settings)},
        "_init_args": (),
        "_init_kwargs": EasyDict(settings),
        "sigma_min": 0,
        "sigma_max": float("inf"),
        "sigma_data": 0.5,
    }
    held = {"ema": Persistent("EDMPrecond", outer), "dataset_kwargs": EasyDict(path="x")}
    return pickle.dumps(held)

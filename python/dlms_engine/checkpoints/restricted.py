"""Reads pickles of network snapshots without running anything they name.

Every global a pickle asks for is either mapped to an inert stand-in defined here, or refused. The
stand-ins hold data: tensors, constructor arguments, and the tree of modules. Source code stored in
a snapshot is dropped unread.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ADVICE = (
    "It is not read, because reading it could run code. If you trust the file, convert it in an "
    "environment of its own: load it there with the code it came from, then save "
    "net.state_dict() with safetensors and the constructor arguments as JSON."
)


class UnsafeCheckpointError(ValueError):
    """The file asks for something other than tensors and plain arguments."""


class Record:
    """A pickled object reduced to what it was: class name and state."""

    kind = ""

    def __init__(self, kind: str = "", state: dict[str, Any] | None = None) -> None:
        self.kind = kind
        self.state: dict[str, Any] = state or {}


class _Container(Record):
    """nn.Module classes without constructor arguments of interest."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Dict(dict[str, Any]):
    """dnnlib.EasyDict: a dict."""

    def __setstate__(self, state: Any) -> None:
        if state:
            raise UnsafeCheckpointError(f"a dictionary with attributes {state!r}. {ADVICE}")


def _persistent(meta: Any, *rest: Any) -> Record:
    if rest or not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise UnsafeCheckpointError(f"an object of unknown form. {ADVICE}")
    return Record(str(meta.get("class_name")), meta["state"])


def _storage(data: Any, *rest: Any) -> Tensor:
    """The flat values behind a tensor, read by torch's own restricted loader."""
    if rest or not isinstance(data, bytes):
        raise UnsafeCheckpointError(f"tensor data of unknown form. {ADVICE}")
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as exc:
        raise UnsafeCheckpointError(f"tensor data that torch refuses ({exc}). {ADVICE}") from exc
    if not isinstance(held, torch.storage.TypedStorage):
        raise UnsafeCheckpointError(f"{type(held).__name__} as tensor data. {ADVICE}")
    values = torch.empty(0, dtype=held.dtype)
    raw = held._untyped_storage  # the public accessors of a typed storage warn
    return values.set_(raw, 0, (raw.nbytes() // values.element_size(),), (1,))


def _tensor(values: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    whole = [offset, *size, *stride]
    if not isinstance(values, Tensor) or not all(isinstance(n, int) and n >= 0 for n in whole):
        raise UnsafeCheckpointError(f"a tensor of unknown form. {ADVICE}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if n)
    if 0 not in size and last >= values.numel():
        raise UnsafeCheckpointError(
            f"a tensor of size {tuple(size)} reaching beyond its {values.numel()} values. {ADVICE}"
        )
    return torch.as_strided(values, size, stride, offset).clone()


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise UnsafeCheckpointError(f"a parameter of unknown form. {ADVICE}")
    return data


# the only callables a pickle can reach: each checks its arguments and returns data
_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("torch.nn.modules.container", "ModuleList"): _Container,
    ("torch.nn.modules.container", "Sequential"): _Container,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is None:
            raise UnsafeCheckpointError(f"the file asks for {module}.{name}. {ADVICE}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeCheckpointError(f"the file refers to data outside of it. {ADVICE}")


def read_pickle(path: str | Path) -> Any:
    """The contents of ``path`` as dicts, lists, numbers, tensors and ``Record``.

    Raises:
        UnsafeCheckpointError: it asks for anything else, or is not a pickle.
    """
    try:
        with Path(path).open("rb") as file:
            return _Reader(file).load()
    except UnsafeCheckpointError as exc:
        raise UnsafeCheckpointError(f"{path}: {exc}") from exc
    except OSError:
        raise
    except Exception as exc:
        raise UnsafeCheckpointError(f"{path} is not a readable pickle: {exc}. {ADVICE}") from exc


def state_dict(record: Record, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, with the names ``nn.Module.state_dict`` gives."""
    found: dict[str, Tensor] = {}
    hidden = record.state.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, value in (record.state.get(group) or {}).items():
            if isinstance(value, Tensor) and name not in hidden:
                found[prefix + name] = value
    for name, child in (record.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            found |= state_dict(child, f"{prefix}{name}.")
    return found

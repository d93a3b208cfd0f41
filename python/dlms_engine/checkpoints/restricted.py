"""Reads pickles of network snapshots without running anything they name.

Every global a pickle asks for is either mapped to an inert stand-in defined here, or refused. The
stand-ins hold data: tensors, constructor arguments, and the tree of modules. Source code stored in
a snapshot is dropped unread. ``plain_pickle`` reads the opcodes and limits what can grow.
"""

from __future__ import annotations

import io
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import plain_pickle
from .plain_pickle import Refused

_ADVICE = (
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

    def build(self, state: Any) -> None:
        if not isinstance(state, dict) or self.state:
            raise Refused("a module of unknown form")
        self.state = state


class _Dict(dict[str, Any]):
    """dnnlib.EasyDict: a dict."""

    def build(self, state: Any) -> None:
        if state:
            raise Refused("a dictionary with attributes")


def _dict(*arguments: Any) -> _Dict:
    if arguments:
        raise Refused("a dictionary of unknown form")
    return _Dict()


def _ordered(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments:
        raise Refused("an ordered dictionary of unknown form")
    return OrderedDict()


def _set(*arguments: Any) -> set[Any]:
    items = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(items, list):
        raise Refused("a set of unknown form")
    return {plain_pickle.key(item) for item in items}


# -- NumPy: scalars, dtypes and arrays of plain numbers -----------------------------------------------


class _Dtype:
    """``numpy.dtype('f8')``; the byte order comes later, as its state."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code) or code == "f1":
            raise Refused(f"the NumPy dtype {str(code)[:40]!r}")
        self.code = code
        self.order: Literal["<", ">", "=", "|"] = "="

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise Refused("a NumPy dtype of unknown form")
        self.order = order

    def read(self, data: bytes, count: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if len(data) != count * dtype.itemsize:
            raise Refused(f"{len(data)} bytes for {count} {dtype} values")
        return np.frombuffer(data, dtype)


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    if not isinstance(dtype, _Dtype):
        raise Refused("a NumPy scalar of unknown form")
    return dtype.read(_raw(data), 1)[0].item()  # type: ignore[no-any-return]


def _raw(data: Any) -> bytes:
    if isinstance(data, bytes):
        return data
    raise Refused("NumPy data of unknown form")


def _encode(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text of unknown form")
    return text.encode("latin1")


class _Array:
    """``numpy.ndarray``: its values come as its state, and are then a tensor."""

    values: Tensor | None = None

    def build(self, state: Any) -> None:
        shape, dtype, fortran, data = (
            state[1:] if isinstance(state, tuple) and len(state) == 5 else [None] * 4
        )
        if (
            not isinstance(shape, tuple)
            or not all(type(n) is int and n >= 0 for n in shape)
            or not isinstance(dtype, _Dtype)
            or fortran not in (True, False)
        ):
            raise Refused("a NumPy array of unknown form")
        values = dtype.read(_raw(data), math.prod(shape))
        native = values.astype(values.dtype.newbyteorder("="))
        self.values = torch.from_numpy(native.reshape(shape, order="F" if fortran else "C").copy())


def _array(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """How protocol 5 writes an array."""
    array = _Array()
    data = bytes(data) if isinstance(data, bytearray) else data
    array.build((1, shape, dtype, order == "F", data))
    return array


def _persistent(meta: Any, *rest: Any) -> Record:
    if rest or not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise Refused("an object of unknown form")
    return Record(str(meta.get("class_name")), meta["state"])


def _storage(data: Any, *rest: Any) -> Tensor:
    """The flat values behind a tensor, read by torch's own restricted loader."""
    if rest or not isinstance(data, bytes):
        raise Refused("tensor data of unknown form")
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as exc:
        raise Refused(f"tensor data that torch refuses ({exc})") from exc
    if not isinstance(held, torch.storage.TypedStorage):
        raise Refused(f"{type(held).__name__} as tensor data")
    values = torch.empty(0, dtype=held.dtype)
    raw = held._untyped_storage  # the public accessors of a typed storage warn
    return values.set_(raw, 0, (raw.nbytes() // values.element_size(),), (1,))


def _tensor(values: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if (
        not isinstance(values, Tensor)
        or not isinstance(size, tuple)
        or not isinstance(stride, tuple)
    ):
        raise Refused("a tensor of unknown form")
    whole = [offset, *size, *stride]
    plain = all(type(n) is int and 0 <= n < 2**63 for n in whole) and len(size) == len(stride) <= 16
    if not plain:
        raise Refused("a tensor of unknown form")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if n)
    elements = math.prod(size)
    # More elements than values: a file of a few bytes could claim any amount through stride 0.
    if elements > values.numel() or (elements and last >= values.numel()):
        raise Refused(f"a tensor of size {tuple(size)} reaching beyond its {values.numel()} values")
    return torch.as_strided(values, size, stride, offset if elements else 0).clone()


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter of unknown form")
    return data


# the only callables a pickle can reach: each checks its arguments and returns data
_GLOBALS: dict[tuple[str, str], plain_pickle.Factory] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _dict,
    ("collections", "OrderedDict"): _ordered,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("torch.nn.modules.container", "ModuleList"): _Container,
    ("torch.nn.modules.container", "Sequential"): _Container,
    ("torch.nn.modules.activation", "Sigmoid"): _Container,
    ("torch.nn.modules.activation", "Softmax"): _Container,
}


def _never_called(*_: Any) -> Any:
    raise Refused("a call of a function that is only named")


def read_pickle(path: str | Path, named: Iterable[tuple[str, str]] = ()) -> Any:
    """The contents of ``path`` as dicts, lists, numbers, tensors and ``Record``.

    Args:
        named: ``(module, name)`` that the file may hold without calling them; in the result they are
            names (``plain_pickle.Global``) and nothing else.

    Raises:
        UnsafeCheckpointError: it asks for anything else or for too much, or is not a pickle.
    """
    known = _GLOBALS | dict.fromkeys(named, _never_called)
    try:
        with Path(path).open("rb") as file:
            return _plain(plain_pickle.load_pickle(file, known))
    except Refused as exc:
        raise UnsafeCheckpointError(f"{path}: {exc}. {_ADVICE}") from exc
    except OSError:
        raise
    except Exception as exc:
        raise UnsafeCheckpointError(f"{path} is not a readable pickle: {exc}. {_ADVICE}") from exc


def _plain(node: Any) -> Any:
    """NumPy arrays, complete only now, as tensors."""
    if isinstance(node, _Array):
        if node.values is None:
            raise Refused("a NumPy array without values")
        return node.values
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _plain(value)
    elif isinstance(node, list):
        node[:] = map(_plain, node)
    elif isinstance(node, tuple):
        return tuple(map(_plain, node))
    elif isinstance(node, Record):
        _plain(node.state)
    return node


def state_dict(record: Record, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a pickled module, with the names ``nn.Module.state_dict`` gives.

    Raises:
        UnsafeCheckpointError: its state is not a module's.
    """
    found: dict[str, Tensor] = {}
    hidden = record.state.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, set) else set()
    for group in ("_parameters", "_buffers"):
        for name, value in _members(record, group):
            if isinstance(value, Tensor) and name not in hidden:
                found[prefix + name] = value
    for name, child in _members(record, "_modules"):
        if isinstance(child, Record):
            found |= state_dict(child, f"{prefix}{name}.")
    return found


def _members(record: Record, group: str) -> list[tuple[str, Any]]:
    held = record.state.get(group) or {}
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise UnsafeCheckpointError(f"a module of unknown form. {_ADVICE}")
    return list(held.items())

"""Solver files: a learned or handcrafted solver as checked data, never code.

A file is one safetensors container of float64 tensors, at most 1 MiB, whose header carries a JSON
description and a SHA-256 over the description and every tensor's name, shape and bytes. Loading
accepts exactly the bytes saving would write; anything else raises ``SolverFileError``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from .processes import Process, from_config
from .solvers.registry import SOLVERS
from .table import SolverTable

FORMAT = "dlms-solver"
VERSION = 1
MAX_BYTES = 1 << 20
HEADER_KEYS = {"format", "version", "kind", "process", "settings", "distilled", "training"}
METADATA_KEYS = {"description", "sha256"}
DISTILLED_KEYS = {"method", "settings", "best"}
# Methods a file may hold, besides the handcrafted solvers.
LEARNED_METHODS = {"amed", "dlms", "dlms-static", "dode", "free_table", "gits", "ld3"}
# No size in the settings of an untrusted file may ask for more numbers than the file could hold.
LARGEST_INTEGER = MAX_BYTES // 8


class SolverFileError(ValueError):
    """The file is not an intact solver file; the message names path, value and expectation."""


@dataclass(frozen=True)
class SolverRecord:
    """What a file holds.

    Attributes:
        kind: ``"table"``, ``"designer"`` or another registered kind.
        process: noise process the solver was made for.
        tensors: float64, by name.
        settings: JSON values needed to rebuild the solver (name, nfe, prediction, ...).
        distilled: method, settings and best score of a ``DistilledSolver``; None for a plain one.
        training: JSON values that only document how it was made.
    """

    kind: str
    process: Process
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    distilled: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)


class StatePolicy(Protocol):
    """A policy a file can hold: ``from_state(*policy.state())`` is an equal one."""

    kind: str
    process: Process

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Floating-point tensors and JSON settings."""
        ...


Loader = Callable[[Process, dict[str, Tensor], dict[str, Any]], Any]
_loaders: dict[str, Loader] = {}
# kind -> module and class whose ``from_state(tensors, settings)`` rebuilds it, imported on demand
_PROVIDERS = {
    "amed": ("dlms_engine.amed_policy", "AmedPolicy"),
    "designer": ("dlms_engine.designer", "DesignerPolicy"),
}


def register_kind(kind: str, loader: Loader) -> None:
    """``loader(process, tensors, settings)`` rebuilds solvers of ``kind``; ValueError if it cannot.

    The loader must check names, shapes and values: it is given untrusted numbers.
    """
    _loaders[kind] = loader


def register_method(name: str) -> None:
    """Allows tables of method ``name`` in files (for learners outside the package)."""
    LEARNED_METHODS.add(name)


def save_solver(
    path: str | os.PathLike[str], solver: Any, *, training: Mapping[str, Any] | None = None
) -> Path:
    """Writes ``solver`` to ``path`` atomically (a temporary file in the folder, then a rename).

    Args:
        solver: a ``SolverTable``, a policy with ``kind`` and ``state()``, a ``SolverRecord``, or a
            ``DistilledSolver`` around a table or policy (its ``history`` is not kept).
        training: JSON values documenting how the solver was made (kept, never interpreted).

    Raises:
        SolverFileError: the solver cannot be described (not JSON, not finite, over 1 MiB, unknown
            kind or method); nothing is written then.
    """
    target = Path(path)
    try:
        record = _record(solver, training)
        raw = _serialize(record)
    except (TypeError, ValueError, AttributeError) as exc:
        raise SolverFileError(f"{target}: {type(solver).__name__} cannot be saved: {exc}") from exc
    _check_size(target, len(raw))
    _rebuild(target, record)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


save = save_solver


def load_solver(path: str | os.PathLike[str]) -> Any:
    """The solver in ``path``: what was saved, a table, a policy or a ``DistilledSolver``.

    Raises:
        SolverFileError: not an intact, known, valid solver file.
        OSError: the file cannot be read.
    """
    return _rebuild(Path(path), read_solver(path))


def read_solver(path: str | os.PathLike[str]) -> SolverRecord:
    """The checked parts of a file, without rebuilding the solver.

    Raises:
        SolverFileError: as for ``load_solver``, except for the kind's own checks.
    """
    source = Path(path)
    with source.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    _check_size(source, len(raw))
    description, digest, tensors = _parse(source, raw)
    _check_tensors(source, tensors)
    record = _describe(source, description, tensors)
    expected = _digest(description, tensors)
    if digest != expected:
        raise SolverFileError(f"{source}: SHA-256 is {expected}, the file says {digest}: damaged")
    if _serialize(record) != raw:
        raise SolverFileError(f"{source}: header is not in the form dlms_engine writes: damaged")
    return record


# -- writing ---------------------------------------------------------------------------------


def _record(solver: Any, training: Mapping[str, Any] | None) -> SolverRecord:
    distilled = None
    policy = getattr(solver, "policy", None)
    if policy is not None:
        distilled = {key: getattr(solver, key) for key in sorted(DISTILLED_KEYS)}
        solver = policy
    if isinstance(solver, SolverRecord):
        record = solver
    elif isinstance(solver, SolverTable):
        tensors, settings = solver.to_dict(), solver.settings()
        record = SolverRecord("table", solver.process, tensors, settings, distilled)
    else:
        tensors, settings = solver.state()
        record = SolverRecord(solver.kind, solver.process, tensors, settings, distilled)
    notes = record.training if training is None else dict(training)
    # through JSON: what is checked and hashed is what a reader will see
    return SolverRecord(
        record.kind,
        record.process,
        {name: _float64(name, value) for name, value in record.tensors.items()},
        json.loads(_canonical(record.settings)),
        json.loads(_canonical(record.distilled)),
        json.loads(_canonical(notes)),
    )


def _float64(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"tensor {name!r} is {value.dtype}, expected floating point")
    return value.detach().to("cpu", torch.float64).contiguous()


def _canonical(value: Any) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )


def _data(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().astype("<f8", copy=False).tobytes()


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        sha.update(_canonical([name, list(tensors[name].shape)]).encode())
        sha.update(_data(tensors[name]))
    return sha.hexdigest()


def _serialize(record: SolverRecord) -> bytes:
    """The one byte string of a record: safetensors, entries by name, keys sorted."""
    description = _canonical(
        {
            "format": FORMAT,
            "version": VERSION,
            "kind": record.kind,
            "process": record.process.config(),
            "settings": record.settings,
            "distilled": record.distilled,
            "training": record.training,
        }
    )
    digest = _digest(description, record.tensors)
    header: dict[str, Any] = {"__metadata__": {"description": description, "sha256": digest}}
    chunks, offset = [], 0
    for name in sorted(record.tensors):
        data = _data(record.tensors[name])
        header[name] = {
            "dtype": "F64",
            "shape": list(record.tensors[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    head = _canonical(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(chunks)


# -- reading ---------------------------------------------------------------------------------


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise SolverFileError(f"{path}: more than the limit of {MAX_BYTES} bytes for a solver")


def _parse(path: Path, raw: bytes) -> tuple[str, str, dict[str, Tensor]]:
    try:
        tensors = parse_safetensors(raw)
        size = struct.unpack_from("<Q", raw)[0]
        metadata = json.loads(raw[8 : 8 + size])["__metadata__"]
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error, RuntimeError) as exc:
        raise SolverFileError(
            f"{path}: {len(raw)} bytes that are not a safetensors solver file: {exc}"
        ) from exc
    if not isinstance(metadata, dict) or set(metadata) != METADATA_KEYS:
        raise SolverFileError(
            f"{path}: metadata is {metadata!r:.200}, expected the keys {sorted(METADATA_KEYS)}"
        )
    return metadata["description"], metadata["sha256"], tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.dtype != torch.float64:
            raise SolverFileError(f"{path}: tensor {name!r} is {value.dtype}, expected float64")
        if not bool(value.isfinite().all()):
            raise SolverFileError(f"{path}: tensor {name!r} holds NaN or infinity")


def _describe(path: Path, text: str, tensors: dict[str, Tensor]) -> SolverRecord:
    try:
        description = json.loads(text, parse_constant=_reject)
    except (ValueError, RecursionError) as exc:
        raise SolverFileError(f"{path}: description is not JSON: {exc}") from exc
    if not isinstance(description, dict) or set(description) != HEADER_KEYS:
        keys = sorted(description) if isinstance(description, dict) else type(description).__name__
        raise SolverFileError(f"{path}: description has {keys}, expected {sorted(HEADER_KEYS)}")
    found = (description["format"], description["version"])
    if found != (FORMAT, VERSION) or isinstance(found[1], bool):
        raise SolverFileError(
            f"{path}: format and version are {found!r}, expected {(FORMAT, VERSION)!r}; a newer file "
            "needs a newer dlms_engine"
        )
    for key in ("process", "settings", "training", "distilled"):
        value = description[key]
        if not isinstance(value, dict) and not (key == "distilled" and value is None):
            raise SolverFileError(f"{path}: {key} is {value!r:.80}, expected an object")
    try:
        process = from_config(description["process"])
    except (ValueError, TypeError) as exc:
        raise SolverFileError(f"{path}: {exc}") from exc
    return SolverRecord(
        description["kind"],
        process,
        tensors,
        description["settings"],
        description["distilled"],
        description["training"],
    )


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _rebuild(path: Path, record: SolverRecord) -> Any:
    loader = _loader(path, record.kind)
    try:
        _check_tensors(path, record.tensors)
        _check_integers(record.settings)
        solver = loader(record.process, dict(record.tensors), dict(record.settings))
        return solver if record.distilled is None else _distilled(solver, record.distilled)
    except SolverFileError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as exc:
        raise SolverFileError(f"{path}: {exc}") from exc


def _loader(path: Path, kind: Any) -> Loader:
    known = {*_loaders, *_PROVIDERS}
    if not isinstance(kind, str) or kind not in known:
        raise SolverFileError(f"{path}: kind is {kind!r}, expected one of {sorted(known)}")
    if kind in _loaders:
        return _loaders[kind]
    module, name = _PROVIDERS[kind]
    policy = getattr(importlib.import_module(module), name)

    def load(process: Process, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Any:
        made = policy.from_state(tensors, settings)
        if made.process != process:
            raise ValueError(f"the {kind} was made for {made.process!r}, the file says {process!r}")
        return made

    return load


def _check_integers(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"settings hold the integer {value}, expected at most {LARGEST_INTEGER}")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_integers(item)


def _check_method(method: Any) -> None:
    known = {*SOLVERS, *LEARNED_METHODS}
    if not isinstance(method, str) or method not in known:
        raise ValueError(f"method is {method!r}, expected one of {sorted(known)}")


def _distilled(policy: Any, parts: dict[str, Any]) -> Any:
    if set(parts) != DISTILLED_KEYS:
        raise ValueError(f"distilled has {sorted(parts)}, expected {sorted(DISTILLED_KEYS)}")
    _check_method(parts["method"])
    for key in ("settings", "best"):
        if not isinstance(parts[key], dict):
            raise ValueError(f"distilled {key} is {parts[key]!r:.80}, expected an object")
    module = importlib.import_module("dlms_engine.learners.solver")
    return module.DistilledSolver(policy, **parts)


def _load_table(
    process: Process, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> SolverTable:
    table = SolverTable.from_dict(process, tensors, settings)
    _check_method(table.options.get("method", table.name))
    return table


register_kind("table", _load_table)

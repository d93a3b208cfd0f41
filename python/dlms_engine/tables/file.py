"""Solver files: a learned or handcrafted solver as checked data, never code.

The bytes are described in ``tables.format``; here are the kinds of solvers a file can hold.
Anything that is not an intact file of a known kind and method raises ``SolverFileError``.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..processes import Process
from ..solvers.registry import SOLVERS
from .format import (
    MAX_BYTES,
    SolverFileError,
    SolverRecord,
    canonical,
    check_size,
    check_tensors,
    parse,
    serialize,
)
from .table import SolverTable

__all__ = [
    "SolverFileError",
    "SolverRecord",
    "load_solver",
    "read_solver",
    "register_kind",
    "register_method",
    "save",
    "save_solver",
]

DISTILLED_KEYS = {"method", "settings", "best"}
# Methods a file may hold, besides the handcrafted solvers.
LEARNED_METHODS = {
    "amed",
    "amed-static",
    "dlms",
    "dlms-static",
    "dode",
    "free_table",
    "gits",
    "ld3",
}
# No size in the settings of an untrusted file may ask for more numbers than the file could hold.
LARGEST_INTEGER = MAX_BYTES // 8


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
    "amed": ("dlms_engine.policies.amed", "AmedPolicy"),
    "designer": ("dlms_engine.policies.dlms", "DesignerPolicy"),
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
        raw = serialize(record)
    except (TypeError, ValueError, AttributeError) as exc:
        raise SolverFileError(f"{target}: {type(solver).__name__} cannot be saved: {exc}") from exc
    check_size(target, len(raw))
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
        return parse(source, file.read(MAX_BYTES + 1))


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
        json.loads(canonical(record.settings)),
        json.loads(canonical(record.distilled)),
        json.loads(canonical(notes)),
    )


def _float64(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"tensor {name!r} is {value.dtype}, expected floating point")
    return value.detach().to("cpu", torch.float64).contiguous()


def _rebuild(path: Path, record: SolverRecord) -> Any:
    loader = _loader(path, record.kind)
    try:
        check_tensors(path, record.tensors)
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
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
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
    module = importlib.import_module("dlms_engine.policies.distilled")
    return module.DistilledSolver(policy, **parts)


def _load_table(
    process: Process, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> SolverTable:
    table = SolverTable.from_dict(process, tensors, settings)
    _check_method(table.options.get("method", table.name))
    return table


register_kind("table", _load_table)

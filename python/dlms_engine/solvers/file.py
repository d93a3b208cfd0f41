"""Solver files: a learned or handcrafted solver as checked data, never code.

The bytes are described in ``tables.format``; here are the kinds of solvers a file can hold.
Anything that is not an intact file of a known kind and method raises ``SolverFileError``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..processes import Process
from ..support.files import SOLVER_FILE, write_bytes
from .format import (
    MAX_BYTES,
    SolverFileError,
    SolverRecord,
    canonical,
    check_tensors,
    parse,
    serialize,
)
from .policy import Policy
from .table import SolverTable

__all__ = [
    "SolverFileError",
    "SolverRecord",
    "read_solver",
    "register_kind",
    "register_method",
    "register_policy",
]

TABLE = "table"
DISTILLED_KEYS = {"method", "settings", "best"}
# Methods a file may hold; the handcrafted solvers are added by their registry.
METHODS = {
    "amed",
    "amed-static",
    "auto",
    "dlms",
    "dlms-static",
    "dode",
    "dyweight",
    "epd",
    "free_table",
    "gits",
    "gs",
    "ld3",
}
# No size in the settings of an untrusted file may ask for more numbers than the file could hold.
LARGEST_INTEGER = MAX_BYTES // 8


@runtime_checkable
class StatePolicy(Policy, Protocol):
    """A policy a file can hold: ``from_state(*policy.state())`` is an equal one."""

    kind: ClassVar[str]  # what the file calls it

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Floating-point tensors and JSON settings."""
        ...

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Policy:
        """Inverse of ``state``; ValueError on anything that does not fit."""
        ...


Loader = Callable[[Process, dict[str, Tensor], dict[str, Any]], Any]
_loaders: dict[str, Loader] = {}


def register_kind(kind: str, loader: Loader) -> None:
    """``loader(process, tensors, settings)`` rebuilds solvers of ``kind``; ValueError if it cannot.

    The loader must check names, shapes and values: it is given untrusted numbers.
    """
    _loaders[kind] = loader


def register_policy(policy: type[StatePolicy]) -> None:
    """Files may hold ``policy``: ``register_kind`` with its ``kind`` and ``from_state``."""

    def load(process: Process, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Policy:
        made = policy.from_state(tensors, settings)
        if made.process != process:
            raise ValueError(
                f"the {policy.kind} was made for {made.process!r}, the file says {process!r}"
            )
        return made

    register_kind(policy.kind, load)


def register_method(name: str) -> None:
    """Allows tables of method ``name`` in files (for learners outside the package)."""
    METHODS.add(name)


def write_record(target: Path, record: SolverRecord) -> Path:
    """Writes ``record`` to ``target`` atomically (a temporary file in the folder, then a rename).

    Raises:
        SolverFileError: it is over 1 MiB, or would not be read back; nothing is written then.
    """
    raw = serialize(record)
    rebuild_policy(target, parse(target, raw))
    write_bytes(target, raw)
    return target


def solver_file(path: str | os.PathLike[str]) -> Path:
    """``path``, or of a directory, such as a saved scheduler's, the file ``SOLVER_FILE`` in it.

    Raises:
        SolverFileError: a directory without one.
    """
    source = Path(path)
    if not source.is_dir():
        return source
    if not (source / SOLVER_FILE).is_file():
        raise SolverFileError(f"{path} is a directory without {SOLVER_FILE}: name the solver file")
    return source / SOLVER_FILE


def read_solver(path: str | os.PathLike[str]) -> SolverRecord:
    """The checked parts of a file, without rebuilding the solver.

    Args:
        path: as for ``solver_file``.

    Raises:
        SolverFileError: as for ``load_solver``, except for the kind's own checks.
    """
    source = solver_file(path)
    with source.open("rb") as file:
        return parse(source, file.read(MAX_BYTES + 1))


def record_of(
    solver: Policy | SolverRecord,
    distilled: dict[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> SolverRecord:
    """What a file says of ``solver``.

    Args:
        distilled: ``DISTILLED_KEYS`` of what holds the policy.
        training: JSON values documenting how it was made; None keeps the record's own.

    Raises:
        TypeError, ValueError: not JSON, not finite, not floating point.
    """
    if isinstance(solver, SolverRecord):
        record = solver
    elif isinstance(solver, SolverTable):
        tensors, settings = solver.to_dict(), solver.settings()
        record = SolverRecord(TABLE, solver.process, tensors, settings, distilled)
    elif not isinstance(solver, StatePolicy):
        raise TypeError("expected a table, or a policy with kind, state and from_state")
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


def rebuild_policy(path: Path, record: SolverRecord) -> Any:
    """The policy in ``record``, without what holds it.

    Raises:
        SolverFileError: unknown kind, method or distilled parts, or numbers that do not fit.
    """
    kind = record.kind
    if not isinstance(kind, str) or kind not in _loaders:
        raise SolverFileError(f"{path}: kind is {kind!r}, expected one of {sorted(_loaders)}")
    try:
        check_tensors(path, record.tensors)
        _check_integers(record.settings)
        solver = _loaders[kind](record.process, dict(record.tensors), dict(record.settings))
        if record.distilled is not None:
            _check_distilled(record.distilled)
        return solver
    except SolverFileError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError) as exc:
        raise SolverFileError(f"{path}: {exc}") from exc


def _check_integers(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"settings hold the integer {value}, expected at most {LARGEST_INTEGER}")
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        _check_integers(item)


def _check_method(method: Any) -> None:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {sorted(METHODS)}")


def _check_distilled(parts: Mapping[str, Any]) -> None:
    if set(parts) != DISTILLED_KEYS:
        raise ValueError(f"distilled has {sorted(parts)}, expected {sorted(DISTILLED_KEYS)}")
    _check_method(parts["method"])
    for key in ("settings", "best"):
        if not isinstance(parts[key], dict):
            raise ValueError(f"distilled {key} is {parts[key]!r:.80}, expected an object")


def _load_table(
    process: Process, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> SolverTable:
    table = SolverTable.from_dict(process, tensors, settings)
    _check_method(table.options.get("method", table.name))
    return table


register_kind(TABLE, _load_table)

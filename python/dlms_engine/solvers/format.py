"""The bytes of a solver file: how a record is written, and the only bytes accepted back.

One safetensors container of float64 tensors, at most 1 MiB. Its metadata holds a JSON description
and a SHA-256 over the description and every tensor's name, shape and bytes. Reading writes the
record again and compares, so a file has exactly one accepted spelling.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from .._version import __version__
from ..processes import Process, from_config

_FORMAT = "dlms-solver"
VERSION = 1
MAX_BYTES = 1 << 20
HEADER_KEYS = {"format", "version", "kind", "process", "settings", "distilled", "training"}
METADATA_KEYS = {"description", "sha256"}


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


def canonical(value: Any) -> str:
    """JSON text with sorted keys; TypeError or ValueError for anything JSON cannot say."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )


def _data(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().astype("<f8", copy=False).tobytes()


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        sha.update(canonical([name, list(tensors[name].shape)]).encode())
        sha.update(_data(tensors[name]))
    return sha.hexdigest()


def serialize(record: SolverRecord) -> bytes:
    """The one byte string of a record: safetensors, entries by name, keys sorted."""
    description = canonical(
        {
            "format": _FORMAT,
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
    head = canonical(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(chunks)


def parse(path: Path, raw: bytes) -> SolverRecord:
    """The record in ``raw``; ``path`` is for messages.

    Raises:
        SolverFileError: any other bytes than ``serialize`` would write.
    """
    check_size(path, len(raw))
    description, digest, tensors = _open(path, raw)
    check_tensors(path, tensors)
    record = _describe(path, description, tensors)
    expected = _digest(description, tensors)
    if digest != expected:
        raise SolverFileError(f"{path}: SHA-256 is {expected}, the file says {digest}: damaged")
    if serialize(record) != raw:
        raise SolverFileError(f"{path}: header is not in the form dlms_engine writes: damaged")
    return record


def check_size(path: Path, size: int) -> None:
    """SolverFileError above 1 MiB."""
    if size > MAX_BYTES:
        raise SolverFileError(f"{path}: more than the limit of {MAX_BYTES} bytes for a solver")


def _open(path: Path, raw: bytes) -> tuple[str, str, dict[str, Tensor]]:
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


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """SolverFileError unless all are float64 and finite."""
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
    if isinstance(description, dict):
        _check_version(path, description)
    if not isinstance(description, dict) or set(description) != HEADER_KEYS:
        keys = sorted(description) if isinstance(description, dict) else type(description).__name__
        raise SolverFileError(f"{path}: description has {keys}, expected {sorted(HEADER_KEYS)}")
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


def _check_version(path: Path, description: Mapping[str, Any]) -> None:
    """Before the keys, which another version may have changed."""
    found = (description.get("format"), description.get("version"))
    if found == (_FORMAT, VERSION) and not isinstance(found[1], bool):
        return
    newer = isinstance(found[1], int) and found[1] > VERSION
    raise SolverFileError(
        f"{path}: format and version are {found!r}, expected {(_FORMAT, VERSION)!r}, which "
        f"dlms_engine {__version__} reads: "
        + ("a newer file needs a newer dlms_engine" if newer else "distil the solver again")
    )


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")

"""Settings: sorted into their dataclasses, and as plain values."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ..solvers.table import SolverTable
from .training.coerce import coerce


def split_settings(
    settings: dict[str, Any], *kinds: type[Any], nested: dict[str, type[Any]] | None = None
) -> list[dict[str, Any]]:
    """Sorts ``settings`` into the dataclasses ``kinds`` by field name, as the fields' types.

    Names like ``teacher_order`` go to the nested dataclass under ``teacher``; so does a mapping
    ``{"teacher": {"order": ...}}``.

    Raises:
        ValueError: a name that no dataclass has (the known names are listed), or a value that is
            not of its type.
    """
    known = [hints(kind) for kind in kinds]
    found: list[dict[str, Any]] = [{} for _ in kinds]
    inner: dict[str, dict[str, Any]] = {name: {} for name in nested or {}}
    for key, value in flat(settings, set(inner)).items():
        places = [i for i, names in enumerate(known) if key in names]
        prefix = next((n for n in inner if key.startswith(n + "_")), None)
        own = hints((nested or {})[prefix]) if prefix else {}
        if key in inner and not isinstance(value, (nested or {})[key]):
            raise ValueError(f"{key} is {value!r}, expected names with values")
        if places:
            found[places[0]][key] = coerce(key, value, known[places[0]][key])
        elif prefix and key[len(prefix) + 1 :] in own:
            short = key[len(prefix) + 1 :]
            inner[prefix][short] = coerce(key, value, own[short])
        else:
            names = sorted(set().union(*known) | {f"{n}_..." for n in inner})
            raise ValueError(f"unknown setting {key!r}; known settings: {', '.join(names)}")
    for name, values in inner.items():
        if values:
            found[0][name] = (nested or {})[name](**values)
    return found


def hints(kind: type[Any]) -> dict[str, Any]:
    """Field name -> type of a settings dataclass."""
    resolved = typing.get_type_hints(kind)
    return {field.name: resolved[field.name] for field in dataclasses.fields(kind)}


def flat(settings: dict[str, Any], nested: set[str]) -> dict[str, Any]:
    """``{"teacher": {"order": 3}}`` as ``{"teacher_order": 3}`` for the names ``nested``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        parts = {key: value}
        if key in nested and isinstance(value, dict):
            parts = {f"{key}_{inner}": held for inner, held in value.items()}
        for name, held in parts.items():
            if name in flat:
                raise ValueError(f"setting {name} is given twice")
            flat[name] = held
    return flat


def plain(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as JSON values: tables and tensors as lists of times."""
    from torch import Tensor

    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, SolverTable):
            value = value.grid
        if isinstance(value, Tensor):
            value = value.tolist()
        elif dataclasses.is_dataclass(value):
            value = plain(value)
        elif callable(value):
            value = getattr(value, "__qualname__", type(value).__name__)
        elif not isinstance(value, (str, int, float, bool, list, tuple, dict, type(None))):
            value = str(value)
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found

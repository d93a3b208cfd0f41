"""The learners by name, their settings resolved and their presets."""

from __future__ import annotations

import copy
from typing import Any

from ..solvers.file import register_method
from .amed import AMED
from .auto import AUTO
from .dlms import DLMS
from .dode import DODE
from .entry import LearnerEntry
from .free_table import FREE_TABLE
from .gits import GITS
from .ld3 import LD3
from .settings import flat, plain, split_settings

LEARNERS: dict[str, LearnerEntry] = {
    entry.name: entry for entry in (AUTO, DLMS, AMED, LD3, DODE, GITS, FREE_TABLE)
}
"""name -> learner, in the order in which they are listed."""


def register_learner(entry: LearnerEntry) -> None:
    """Adds a learner of another package, under every command.

    Raises:
        ValueError: a learner of that name is there already.
    """
    if entry.name in LEARNERS:
        raise ValueError(f"there is a learner {entry.name!r} already")
    LEARNERS[entry.name] = entry
    register_method(entry.name)


def learner(method: str) -> LearnerEntry:
    """The entry of ``method``.

    Raises:
        ValueError: unknown.
    """
    if method not in LEARNERS:
        raise ValueError(f"method is {method!r}, expected one of {sorted(LEARNERS)}")
    return LEARNERS[method]


def presets() -> dict[str, dict[str, Any]]:
    """Preset -> keyword arguments of ``distill``: its method and what differs from the defaults."""
    return {
        name: {"method": entry.name, **copy.deepcopy(dict(settings))}
        for entry in LEARNERS.values()
        for name, settings in entry.presets.items()
    }


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """``presets()[name]`` with ``changes``.

    Raises:
        ValueError: unknown name.
    """
    known = presets()
    if name not in known:
        raise ValueError(f"preset is {name!r}, expected one of {sorted(known)}")
    return {**known[name], **changes}


def flattened(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """``{"teacher": {"order": 3}}`` as ``{"teacher_order": 3}``, for the nested ones of ``method``."""
    return flat(settings, set(learner(method).nested))


def resolved(
    method: str,
    nfe: int,
    settings: dict[str, Any],
    *,
    trajectories: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that ``distill`` would use, defaults included, as JSON values.

    Where a method begins is left out if ``settings`` do not say it: that is measured.

    Returns:
        ``method``, ``nfe``, ``trajectories``, ``seed`` and ``settings``, which may be given to
        ``distill`` again.

    Raises:
        ValueError: unknown method or setting, values out of range.
    """
    entry = learner(method)
    own, *shared = split_settings(settings, *entry.kinds, nested=entry.nested)
    groups = [{"nfe": nfe, **own}]
    if shared:
        groups.append({"seed": seed, **entry.defaults, **shared[0]})
    if trajectories is not None and entry.trajectories is not None:
        groups[-1][entry.trajectories] = trajectories
    values: dict[str, Any] = {}
    for kind, arguments in zip(entry.kinds, groups, strict=True):
        values |= plain(kind(**arguments))
    begins = (
        () if entry.begin is None or set(entry.begin.settings) & set(own) else entry.begin.settings
    )
    for name in ("nfe", "seed", *begins):
        values.pop(name, None)
    if entry.trajectories is not None:
        trajectories = values.pop(entry.trajectories)
    elif trajectories is None:
        trajectories = entry.samples
    return {
        "method": method,
        "nfe": nfe,
        "trajectories": trajectories,
        "seed": seed,
        "settings": values,
    }

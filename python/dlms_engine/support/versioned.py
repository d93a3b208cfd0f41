"""Pickles of the engine's objects name the version that wrote them; another version refuses them."""

from __future__ import annotations

from typing import Any

from .._version import __version__

KEY = "_dlms_engine_version"


class VersionError(RuntimeError):
    """A pickle was written by another version; the message says what to do."""


class Versioned:
    """Mixin, before ``nn.Module``: copies and pickles within one version work as always.

    An object's attributes are no file format: they change between versions, and a module that is
    unpickled into other code would compute something else without saying so. Solver files and
    converted checkpoints are the formats to keep.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, KEY: __version__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        check_version(type(self).__name__, state.pop(KEY, None))
        restore = getattr(super(), "__setstate__", None)
        if restore is None:
            self.__dict__.update(state)
        else:
            restore(state)


def check_version(name: str, writer: str | None) -> None:
    """Refuses what ``writer`` pickled.

    Raises:
        VersionError: it is not this version; None stands for versions that did not say.
    """
    if writer == __version__:
        return
    told = "an older dlms_engine, or another program" if writer is None else f"dlms_engine {writer}"
    raise VersionError(
        f"this {name} was pickled by {told}; this is {__version__}, and pickles are not kept "
        "compatible. Keep solvers as files (dlms_engine.save, load_solver) and networks as "
        "safetensors (dlms convert); to get this one out, load it with the version that wrote it, and "
        "save it there"
    )

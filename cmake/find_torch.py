"""Prints the folder of the torch package of this interpreter's environment, or nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 11)


def candidates() -> Iterator[str]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        yield from spec.submodule_search_locations
    # pip's build isolation takes these out of sys.path; the prefix still tells where they are.
    for name in ("purelib", "platlib"):
        yield os.path.join(sysconfig.get_path(name), "torch")
    # Front ends that build in an environment of their own name the target's here.
    if "VIRTUAL_ENV" in os.environ:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield os.path.join(os.environ["VIRTUAL_ENV"], "lib", version, "site-packages", "torch")


def folder() -> str | None:
    """The first torch package that is new enough; else the first of any version, or None."""
    complete = [
        os.path.abspath(path)
        for path in candidates()
        if os.path.isfile(os.path.join(path, "version.py"))
        and os.path.isdir(os.path.join(path, "include"))
    ]
    new = [path for path in complete if version_of(path) >= OLDEST]
    return (new or complete or [None])[0]


def version_of(path: str) -> tuple[int, ...]:
    text = Path(path, "version.py").read_text(encoding="utf-8")
    number = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return tuple(map(int, number.groups())) if number else (0, 0)


if __name__ == "__main__":
    print(folder() or "", end="")

"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the end of the block renames it to ``path``.

    A reader sees the old file or the new one, never half of one, and so does whoever comes after a
    kill or a full disk. Where the block fails, what it wrote is removed and ``path`` is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")

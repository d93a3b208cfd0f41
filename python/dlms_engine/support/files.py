"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the end of the block renames it to ``path``.

    A reader sees the old file or the new one, never half of one, and so does whoever comes after a
    kill, a full disk or a loss of power: the bytes are on the disk before the name is. Several
    processes may replace one file at once; the last one wins. Where the block fails, what it wrote
    is removed and ``path`` is untouched.

    The file's mode is that of a new file under the umask, whatever the writer in the block does.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    mode = _create(partial)
    try:
        yield partial
        os.chmod(partial, mode)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system has folders that can be synchronised
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _create(path: Path) -> int:
    """Makes an empty file; returns the mode that the umask leaves it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    # Windows flushes only what is open for writing, and no folder.
    writable = os.O_RDWR if path.is_file() else os.O_RDONLY
    handle = os.open(path, writable)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

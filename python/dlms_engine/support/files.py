"""Files that are there whole or not at all: the one way in which this library replaces a file."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_log = logging.getLogger("dlms_engine")

_ABANDONED = 24 * 3600.0
"""Seconds after which a partial file belongs to a process that was killed."""
_ROOM = 1 << 16
"""Bytes that a solver file with its report takes, about."""

SOLVER_FILE = "dlms_solver.safetensors"
"""What a directory with a solver, such as a saved scheduler's, has it in."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the end of the block renames it to ``path``.

    A reader sees the old file or the new one, never half of one, and so does a reader that comes after a
    kill or a full disk: bytes and folder are on the disk before the block ends. Two processes may
    replace one file at once; the last rename stays. The file's mode is that of a new file under the
    umask, whatever the writer in the block does.

    Raises:
        OSError: the system refused, in one line; what was written is removed and ``path`` is
            untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        mode = _create(partial, path)
        yield partial
        _finish(partial, path, mode)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if not _is_refusal(error):
            raise
        raise _refused(path, error) from error


def require_writable(path: Path) -> None:
    """Ahead of the work: that ``path`` can be written, with a little room beside it.

    Raises:
        OSError: as ``replacing``.
    """
    if os.path.isdir(path):  # which only the rename at the end would find
        raise _refused(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    with contextlib.suppress(_Tried), replacing(path) as partial:
        partial.write_bytes(bytes(_ROOM))
        _sync(partial)
        raise _Tried


def written(write: Callable[[], object], what: str) -> bool:
    """Calls ``write``; a side file that cannot be written does not end the work.

    Args:
        what: begins the warning, such as ``"no report"``.
    """
    try:
        write()
    except OSError as error:
        _log.warning("%s: %s", what, error)
        return False
    return True


@contextmanager
def only_one(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Held by the one process that is making ``path``; the system lets go of it after a kill.

    Args:
        wait: until the other process is done, for what both may then read.

    Raises:
        RuntimeError: another process holds it, and ``wait`` is False.
        OSError: the folder cannot be written to.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another process is making {path}: wait for it, or choose another output"
        ) from error
    except OSError as error:
        raise _refused(path, error) from error
    try:
        yield
    finally:
        if (
            not wait
        ):  # one that waits has the file open: its lock would be invisible to everyone else
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()


def read_text(path: Path, most: int = 1 << 20) -> str:
    """The UTF-8 text in ``path``, without the mark that some editors begin with.

    Raises:
        ValueError: more than ``most`` bytes, as a device or a wrong file has, or not UTF-8.
        OSError: it cannot be read.
    """
    with open(path, "rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes, the limit for such a file")
    return data.decode("utf-8-sig")


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces ``path`` by ``data``."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Replaces ``path`` by a safetensors file."""
    with replacing(path) as partial:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata)


class _Tried(Exception):
    """A file that was written to see whether it can be."""


def _refused(path: Path, error: BaseException) -> OSError:
    """The system's refusal in one line."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    advice = _ADVICE.get(number or 0, "free some space or choose another output")
    text = f"could not write {path} ({reason}): {advice}; what was there before is untouched"
    return OSError(text) if number is None else OSError(number, text)


_ADVICE = {
    errno.ENOENT: "create the folder or choose another output",
    errno.ENOTDIR: "what stands where its folder should be is a file; choose another output",
    errno.EISDIR: "it is a folder: name a file in it or choose another output",
    errno.EACCES: "you may not write there: choose another output",
    errno.EPERM: "you may not write there: choose another output",
    errno.EROFS: "nothing can be written there: choose another output",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _is_refusal(error: BaseException) -> bool:
    """Whether the system refused to write; safetensors has an error class of its own for that."""
    if isinstance(error, SafetensorError):
        return "Io" in str(error) or "I/O" in str(error) or "os error" in str(error)
    return isinstance(error, OSError)


def _create(partial: Path, path: Path) -> int:
    """Makes an empty file, so that a folder that is absent or read-only is found before the work;
    returns the mode that the umask leaves it.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*-*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _ABANDONED:
                stale.unlink()
    handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _finish(partial: Path, path: Path, mode: int) -> None:
    """Onto the disk, then under its name, then the folder's entry onto the disk."""
    os.chmod(partial, mode)  # the writer may have replaced the file
    _sync(partial)
    partial.replace(path)
    with contextlib.suppress(OSError):  # not every file system has folders that can be synchronised
        _sync(path.parent)


def _sync(path: Path) -> None:
    # Windows flushes only what is open for writing, and no folder.
    writable = os.O_RDWR if path.is_file() else os.O_RDONLY
    handle = os.open(path, writable)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A file is replaced whole or left as it was."""

from __future__ import annotations

import os
import secrets
import stat
import threading
from pathlib import Path

import pytest

from dlms_engine import grids, solvers
from dlms_engine.policies.distilled import save_solver
from dlms_engine.processes import EDM
from dlms_engine.support import files
from dlms_engine.support.files import replacing, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "held.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half of")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [held.name for held in tmp_path.iterdir()] == ["held.json"]
    write_text(path, "n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode()
    assert [held.name for held in tmp_path.iterdir()] == ["held.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_a_new_file(umask: int, mode: int, tmp_path: Path) -> None:
    """Solver files were 0600 whatever the umask: another user of the machine could not read them."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "held.json", "text")
        table = solvers.ddim(EDM(), grids.polynomial(EDM(), 3))
        save_solver(tmp_path / "solver.safetensors", table)
        with replacing(tmp_path / "private") as partial:
            partial.unlink()
            partial.touch(mode=0o600)  # a writer that makes its own file
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == dict.fromkeys(
        ("held.json", "solver.safetensors", "private"), mode
    )


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    """/dev/zero as a configuration was read until the memory was full."""
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(path) == "{}"
    with pytest.raises(ValueError, match=r"config\.json has more than 4 bytes"):
        files.read_text(path, 4)
    if Path("/dev/zero").exists():
        with pytest.raises(ValueError, match="/dev/zero has more than 1048576 bytes"):
            files.read_text(Path("/dev/zero"))


def no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_found_ahead_of_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    path.write_text("old")
    files.require_writable(path)
    with pytest.raises(OSError, match=r"could not write .*absent/run\.safetensors \(No such file"):
        files.require_writable(tmp_path / "absent" / "run.safetensors")
    monkeypatch.setattr(files, "_sync", no_room)
    with pytest.raises(OSError, match=r"could not write .*run\.safetensors \(No space left"):
        files.require_writable(path)
    assert [held.name for held in tmp_path.iterdir()] == ["run.safetensors"]
    assert path.read_text() == "old"


def test_what_to_do_fits_what_the_system_said(tmp_path: Path) -> None:
    """A folder that was not there was answered with "free some space"."""
    (tmp_path / "file").touch()
    for path, advice in (
        (tmp_path / "absent" / "run.png", r"\(No such file or directory\): create the folder or"),
        (tmp_path / "file" / "run.png", r"\(Not a directory\): what stands where its folder"),
        (tmp_path, r"\(Is a directory\): it is a folder: name a file in it"),
        (tmp_path / ("x" * 300), r"\(File name too long\): choose a shorter name"),
    ):
        with pytest.raises(OSError, match=advice):
            files.require_writable(path)


def test_a_lock_that_cannot_be_made_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.FileLock, "acquire", read_only)
    with (
        pytest.raises(
            OSError, match=r"could not write .*held\.json \(Read-only file system\): .*choose"
        ),
        files.only_one(tmp_path / "held.json"),
    ):
        pass


def test_what_lies_beside_a_result_does_not_end_the_work(caplog: pytest.LogCaptureFixture) -> None:
    assert files.written(lambda: None, "no report")
    assert not files.written(no_room, "no report")
    assert "no report: [Errno 28] No space left on device" in caplog.text
    with pytest.raises(ZeroDivisionError):
        files.written(lambda: 1 // 0, "no report")


SAVES = 150


def race(path: Path) -> list[str]:
    """What two threads that replace one file meet."""
    met: list[str] = []

    def save(text: str) -> None:
        try:
            for _ in range(SAVES):
                write_text(path, text * 100)
                assert path.read_text() in ("a" * 100, "b" * 100)
        except (OSError, AssertionError) as error:
            met.append(type(error).__name__)

    threads = [threading.Thread(target=save, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two processes that saved one entry lost a race: FileNotFoundError at the 63rd save."""
    assert race(tmp_path / "held.json") == []
    assert [held.name for held in tmp_path.iterdir()] == ["held.json"]


def test_one_name_for_all_writers_is_a_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the temporary name is the same for everybody, as it was."""
    monkeypatch.setattr(secrets, "token_hex", lambda _count: "same")
    assert race(tmp_path / "held.json")


def test_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "held.json", []
    synchronise = files._sync
    monkeypatch.setattr(
        files, "_sync", lambda p: (order.append((p.name, path.exists())), synchronise(p))
    )
    write_text(path, "text")
    assert [exists for _, exists in order] == [False, True]
    assert order[0][0].startswith(".held.json.") and order[1][0] == tmp_path.name

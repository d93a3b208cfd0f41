"""A file is replaced whole or left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

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

"""What stands in for captured graphs in a rehearsal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def graphs(device: str) -> Iterator[None]:
    """Graphs as they are on a GPU; on the CPU those of the tests, which replay on host memory."""
    if device != "cpu":
        yield
        return
    import pytest
    import standin_driver

    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        standin_driver.in_place(standin_driver.build(Path(folder))) as driver,
    ):
        standin_driver.stand_in(driver, patch)
        yield

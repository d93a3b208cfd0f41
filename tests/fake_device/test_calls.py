"""The public calls on the stand-in device: allowed host reads alone, and the figures of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_device.allowed import ALLOWED, SAMPLING
from fake_device.calls import CALLS, RUNS
from fake_device.standin import standin


def numbers(value: Any) -> Tensor:
    """On the host, whatever it is."""
    held = getattr(value, "numbers", value)
    return held.double() if isinstance(held, Tensor) else torch.tensor(held, dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str, tmp_path: Path) -> None:
    expected = CALLS[name]("cpu", tmp_path / "cpu")
    with standin(*(SAMPLING if name in RUNS else ALLOWED)) as device:
        found = CALLS[name]("gpu", tmp_path / "gpu")
    assert device.operations, "nothing ran on the device"
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        # bfloat16 keeps 8 bits; everything else is the same arithmetic in another order
        loose = name in ("autocast", "by_dtype")
        assert torch.allclose(numbers(one), numbers(other), rtol=0.05 if loose else 1e-3, atol=1e-3)

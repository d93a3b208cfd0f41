"""A sampler is exported for a device that computes nothing: under ``FakeTensorMode`` tensors on it have
no numbers, so the program has to be one of that device alone, without a read by the host.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cli_model import tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dlms_engine as dlms
from dlms_engine.engine import export
from fake_device.models import table


def broken() -> list[str]:
    """What in the exported program reads from the device or lies elsewhere."""
    held = tiny()
    sampler = dlms.Sampler(held.denoiser, table(held.denoiser.process))
    module = export.SamplerModule(sampler, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move(module)
        noise = torch.randn(2, *held.shape, device="gpu:0")
        program = export._export(module, noise, {}, True, 64)
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device != noise.device:
            found.append(f"{node.name} on {value.device}")
        if node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            found.append(f"{node.name} reads")
    assert len(program.graph.nodes) > 50
    return found


def _move(module: nn.Module) -> None:
    """Weights and rows, made on the host, as tensors of the device."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None:
                    moved = torch.empty_like(value, device="gpu:0")
                    wraps = isinstance(value, nn.Parameter)
                    held[name] = nn.Parameter(moved, False) if wraps else moved


def test_the_program_is_on_the_device_alone() -> None:
    assert broken() == []


@pytest.mark.parametrize(
    ("plant", "found"),
    [(lambda x: x.cpu().to(x.device), "on cpu"), (lambda x: x * x.sum().item(), "reads")],
    ids=["cpu", "item"],
)
def test_a_planted_read_is_found(plant: Any, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dlms.Denoiser.network_output

    def output(self: Any, x: Tensor, *rest: Any, **cond: Any) -> Any:
        return whole(self, plant(x), *rest, **cond)

    monkeypatch.setattr(dlms.Denoiser, "network_output", output)
    with pytest.raises(AssertionError, match=found):
        assert broken() == []

"""Faults that the stand-in device has to find: without these the other tests could not fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlms_engine as dlms
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.ops import reference
from fake_device.allowed import ALLOWED, SAMPLING
from fake_device.calls import CALLS
from fake_device.models import SHAPE, SHORT, denoiser, table
from fake_device.standin import BrokenRules, standin


def sampled() -> None:
    there = denoiser("gpu")
    dlms.Sampler(there, table(there.process)).sample(range(2), SHAPE)


def test_a_planted_cpu_in_the_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reference.advance

    def planted(f: Tensor, f_cond: Any, x: Tensor, history: Any, row: Tensor) -> Any:
        return whole(f, f_cond, x, history, row.cpu().to(x.device))

    monkeypatch.setattr(reference, "advance", planted)
    with pytest.raises(BrokenRules, match="_to_copy.*reads from the device"), standin(*SAMPLING):
        sampled()


def test_a_planted_item_in_the_denoiser_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dlms.Denoiser.network_output

    def planted(self: Any, network_input: Tensor, c_noise: Tensor, **cond: Any) -> Any:
        return whole(self, network_input * network_input.new_ones(()).item(), c_noise, **cond)

    monkeypatch.setattr(dlms.Denoiser, "network_output", planted)
    with pytest.raises(BrokenRules, match="_local_scalar_dense"), standin(*SAMPLING):
        sampled()


def test_a_planted_item_in_an_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dlms.advance

    def planted(self: Any, x: Tensor, *rest: Any) -> Tensor:
        assert x.detach().isfinite().all()
        return whole(self, x, *rest)

    monkeypatch.setattr(Dlms, "advance", planted)
    with pytest.raises(BrokenRules, match="objective"), standin(*ALLOWED):
        dlms.distill(
            denoiser("gpu"), "dlms", shape=SHAPE, nfe=5, trajectories=4, progress=False, **SHORT
        )


def test_noise_left_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlms.Denoiser, "device", torch.device("cpu"))
    with (
        pytest.raises(ValueError, match="f is on gpu:0, x is on cpu"),
        standin(*SAMPLING) as device,
    ):
        there = denoiser("gpu")
        dlms.Sampler(there, table(there.process), backend="eager").sample(range(2), SHAPE)
    assert any("was given a CPU tensor" in what for what in device.wrong)


def test_two_devices_do_not_mix() -> None:
    with pytest.raises(BrokenRules, match="gpu:0.*gpu:1"), standin(*SAMPLING):
        torch.zeros(2, device="gpu:0") + torch.zeros(2, device="gpu:1")


def test_a_bare_device_name_is_found_on_the_second_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlms.Denoiser, "device", torch.device("gpu"))
    with pytest.raises(BrokenRules, match="gpu:0.*gpu:1"), standin(*SAMPLING):
        there = denoiser("gpu:1")
        dlms.Sampler(there, table(there.process)).sample(range(2), SHAPE)


def _reads_an_item(x: Tensor) -> Tensor:
    return x * x.detach().new_ones(()).item()


def _goes_over_the_host(x: Tensor) -> Tensor:
    return x.cpu().to(x.device)


@pytest.mark.parametrize("plant", [_reads_an_item, _goes_over_the_host])
@pytest.mark.parametrize("name", CALLS)
def test_a_read_planted_in_an_evaluation_of_any_call_is_found(
    name: str, plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, advance = dlms.Denoiser.network_output, reference.advance

    def output(self: Any, network_input: Tensor, *rest: Any, **cond: Any) -> Any:
        return whole(self, plant(network_input), *rest, **cond)

    def row(f: Tensor, *rest: Any) -> Any:
        return advance(plant(f), *rest)

    if name in ("accelerate", "k_diffusion", "scheduler"):  # no denoiser takes part in these
        monkeypatch.setattr(reference, "advance", row)
    else:
        monkeypatch.setattr(dlms.Denoiser, "network_output", output)
    with pytest.raises(BrokenRules, match="reads from the device"), standin(*ALLOWED):
        CALLS[name]("gpu", tmp_path)

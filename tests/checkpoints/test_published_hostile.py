"""Files of others that call something, were damaged, or hold something else."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import contextlib

from published_cases import (
    EPD_HEUN,
    IPNDM,
    agree,
    dyweight_weights,
    epd_parameters,
    sample,
)
from published_files import (
    dyweight_file,
    loss,
    persistent,
    sampler_modules,
    write,
)
from test_edm import Call, writers  # noqa: F401

from dlms_engine.checkpoints.published import load_published, published_format
from dlms_engine.checkpoints.restricted import UnsafeCheckpointError


@pytest.fixture(autouse=True)
def modules(writers: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    sampler_modules(monkeypatch)


def test_each_check_can_fail(tmp_path: Path) -> None:
    """The fault: one number of the file is moved by a ten-thousandth."""
    weights = dyweight_weights(3)
    before = sample(load_published(dyweight_file(tmp_path / "a.pkl", weights, torch.ones(3))))
    weights[1, 0] += 1e-4
    after = sample(load_published(dyweight_file(tmp_path / "b.pkl", weights, torch.ones(3))))
    assert not agree(after, before)


def hostile(place: str) -> Any:
    """A snapshot in which something is called."""
    call = Call(os.mkdir, "touched")
    held: dict[str, Any] = {
        "model": persistent("EPD_predictor", epd_parameters(2, 2), EPD_HEUN),
        "loss_fn": loss("EPD_loss", "epd"),
    }
    if place == "beside":
        held["more"] = call
    elif place == "attribute":
        held["model"].state["alpha"] = call
    else:
        held["loss_fn"].state["solver_stu"] = NamedCall()
    return held


class NamedCall:
    """Calls a sampler that may only be named."""

    def __reduce__(self) -> Any:
        return sys.modules["solvers"].epd_sampler, ()


@pytest.mark.parametrize("place", ["beside", "attribute", "sampler"])
def test_a_snapshot_that_calls_something_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "s.pkl", hostile(place))
    with pytest.raises(UnsafeCheckpointError):
        load_published(path)
    assert not (tmp_path / "touched").exists()


def test_a_torch_file_that_calls_something_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best_v2.pt"
    torch.save({"params1": NamedCall(), "params2": 0, "best_t_steps": 0}, path)
    with pytest.raises(UnsafeCheckpointError):
        load_published(path, solver="uni_pc")


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("_parameters", [1, 2]),
        ("_parameters", {1: torch.ones(2)}),
        ("_parameters", {}),
        ("_buffers", 3),
        ("_modules", "text"),
        ("_non_persistent_buffers_set", [["mask"]]),
        ("num_steps", None),
        ("schedule_rho", float("nan")),
        ("schedule_rho", 0.0),
        ("schedule_rho", 1e300),
        ("num_points", -1),
    ],
)
def test_a_crafted_module_is_refused(group: str, value: Any, tmp_path: Path) -> None:
    model = persistent("EPD_predictor", epd_parameters(4, 2), EPD_HEUN | {"sampler_stu": "epd"})
    assert load_published(write(tmp_path / "a.pkl", {"model": model})).nfe == 12
    model.state[group] = value
    path = write(tmp_path / "b.pkl", {"model": model})
    if group == "_non_persistent_buffers_set":  # says nothing of parameters
        assert load_published(path).nfe == 12
        return
    with pytest.raises(ValueError, match=str(path)):
        load_published(path)


def test_sparse_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.pt"
    times = torch.ones(6).to_sparse()
    torch.save({"params1": times, "params2": times, "best_t_steps": times}, path)
    with pytest.raises(ValueError, match="b.pt"):
        load_published(path, **IPNDM)


@pytest.mark.parametrize("held", [{}, [], {"model": 1}, {"predictor": {}}, {"ema": {}}, 3, None])
def test_other_files_are_no_solvers(held: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "s.pkl", held)
    assert published_format(path) is None
    with pytest.raises(ValueError, match="no learned solver of AMED, DyWeight, EPD, GAS, LD3"):
        load_published(path)


def test_every_change_of_a_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = dyweight_file(tmp_path / "s.pkl", torch.tril(torch.ones(2, 2)), torch.ones(2))
    raw = path.read_bytes()
    for place in range(0, len(raw), 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :])
        with contextlib.suppress(ValueError):
            load_published(path)

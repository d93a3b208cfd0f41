"""SolverTable: what it promises, and that validate() holds it to that."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dlms_engine import grids
from dlms_engine.processes import EDM
from dlms_engine.solvers import ipndm, unipc
from dlms_engine.solvers.table import SolverTable

TABLE = ipndm(EDM(), grids.polynomial(EDM(), 4), order=2)


def test_properties_and_repr() -> None:
    assert (TABLE.nfe, TABLE.depth, TABLE.prediction, TABLE.batch_shape) == (4, 2, "noise", ())
    assert TABLE.t_start.item() == 80.0 and TABLE.t_end.item() == 0.002
    text = repr(TABLE)
    for part in ("ipndm", "order=2", "nfe=4", "depth=2", "edm", "80"):
        assert part in text
    batched = ipndm(EDM(), torch.stack([TABLE.grid] * 3))
    assert batched.batch_shape == (3,) and "[3] grids" in repr(batched)


def test_dict_round_trip() -> None:
    settings = json.loads(json.dumps(TABLE.settings()))
    again = SolverTable.from_dict(EDM(), TABLE.to_dict(), settings)
    for name, value in TABLE.to_dict().items():
        assert torch.equal(getattr(again, name), value)
    assert again.options == TABLE.options and again.name == TABLE.name


def test_detach_and_to() -> None:
    grid = TABLE.grid.clone().requires_grad_()
    table = unipc(EDM(), grid)
    assert table.b.requires_grad and table.t_start.requires_grad
    free = table.detach()
    assert not any(getattr(free, name).requires_grad for name in (*free.to_dict(), "t_end"))
    assert free.to("cpu").nfe == table.nfe


def broken(**changes: object) -> SolverTable:
    return dataclasses.replace(TABLE, **changes)  # type: ignore[arg-type]


def edited(name: str, index: tuple[int, ...], value: float) -> SolverTable:
    tensor = getattr(TABLE, name).clone()
    tensor[index] = value
    return broken(**{name: tensor})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: broken(prediction="velocity"), "prediction is 'velocity'"),
        (lambda: broken(a=TABLE.a.float()), "a is torch.float32"),
        (lambda: broken(a=TABLE.a[:2]), "expected at most|has shape"),
        (lambda: broken(times=TABLE.times[:-1]), "times has shape"),
        (lambda: broken(initial_scale=torch.ones(2).double()), "initial_scale has shape"),
        (lambda: broken(grid=TABLE.grid[:1]), "at least 2"),
        (lambda: edited("b", (2, 0), float("nan")), "b is .* expected finite"),
        (lambda: edited("a", (0,), float("inf")), "a is .* expected finite"),
        (lambda: edited("b", (0, 1), 0.1), "before the first evaluation"),
        (lambda: edited("grid", (1,), 90.0), "strictly decreasing"),
        (lambda: edited("grid", (0,), 81.0), "not the ends"),
        (lambda: edited("times", (1,), -1.0), ">= 0"),
        (lambda: broken(options={"x": object()}), "JSON"),
        (lambda: broken(options={"x": float("nan")}), "JSON"),
    ],
)
def test_validate_refuses(make, message: str) -> None:
    TABLE.validate()
    with pytest.raises(ValueError, match=message):
        make().validate()


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"a": None}, {}, "tensors are"),
        ({}, {"extra": 1}, "settings are"),
        ({}, {"nfe": 5}, "5, but the table has 4"),
        ({}, {"name": 3}, "string name"),
        ({"grid": torch.ones(()).double()}, {}, "grid has shape"),
    ],
)
def test_from_dict_refuses(tensors, settings, message: str) -> None:
    if tensors == {"a": None}:
        changed = {k: v for k, v in TABLE.to_dict().items() if k != "a"}
    else:
        changed = {**TABLE.to_dict(), **tensors}
    with pytest.raises(ValueError, match=message):
        SolverTable.from_dict(EDM(), changed, {**TABLE.settings(), **settings})

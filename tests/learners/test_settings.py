"""What no learner can use is refused by name before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from mixture_network import mixture_denoiser

from dlms_engine.learners import LEARNERS, distill
from dlms_engine.learners.ld3.objective import Ld3
from dlms_engine.learners.ld3.settings import Ld3Settings
from dlms_engine.learners.registry import resolved
from dlms_engine.learners.settings import hints
from dlms_engine.learners.training.coerce import check_choices, check_least
from dlms_engine.support.parallel import World


def listed(hint: Any) -> bool:
    """Whether ``hint`` is ``Literal[...]``, or that or None."""
    if get_origin(hint) is Literal:
        return True
    parts = [part for part in get_args(hint) if part is not type(None)]
    return len(parts) == 1 and get_origin(parts[0]) is Literal


CHOICES = [
    (entry.name, field)
    for entry in LEARNERS.values()
    for kind in entry.kinds
    for field, hint in hints(kind).items()
    if listed(hint)
]


@pytest.mark.parametrize(("method", "field"), CHOICES)
def test_a_value_that_is_no_choice_is_refused(method: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 'nonsense', expected"):
        resolved(method, 5, {field: "nonsense"})


def test_the_choices_are_found() -> None:
    assert {("amed", "keep"), ("dlms", "coordinates"), ("free_table", "store")} <= set(CHOICES)


def test_a_choice_that_may_be_none_is_checked() -> None:
    @dataclasses.dataclass
    class Settings:
        kind: Literal["a", "b"] | None = None
        free: Literal["a"] | bool = False
        count: int | None = None

    for good in (Settings(), Settings("a"), Settings(free=True), Settings(count=3)):
        check_choices(good)
        check_least(good, count=3)
    with pytest.raises(ValueError, match="kind is 'c', expected one of 'a', 'b' or None"):
        check_choices(Settings("c"))  # type: ignore[arg-type]
    for bad in (2, float("nan")):
        with pytest.raises(ValueError, match=f"count is {bad}, expected at least 3"):
            check_least(Settings(count=bad), count=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("dlms", "order", 0),
        ("dlms", "teacher_interpolation", -1),
        ("dlms", "teacher_order", 0),
        ("dlms", "teacher_order", 4),
        ("dlms", "validation_samples", 0),
        ("dlms", "endpoint_steps", 0),
        ("dlms", "ema_kimg", (0.0,)),
        ("dlms", "clip", float("nan")),
        ("amed", "validation_samples", 0),
        ("ld3", "gamma", -1.0),
        ("free_table", "times_lr", -1.0),
    ],
)
def test_numbers_out_of_range_are_refused(method: str, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} is "):
        resolved(method, 5, {setting: value})


GRIDS = {"dlms": "grid", "amed": "grid", "ld3": "init", "dode": "grid", "free_table": "grid"}


@pytest.mark.parametrize("method", GRIDS)
def test_a_grid_that_starts_elsewhere_is_refused(method: str) -> None:
    """The solutions it is measured against start at ``t_max``."""
    given: dict[str, Any] = {"afs": False} if method in ("dlms", "free_table") else {}
    steps = 2 if method == "amed" else 4
    times = torch.tensor([40.0, 10.0, 3.0, 1.0, 0.002], dtype=torch.float64)[4 - steps :]
    with pytest.raises(ValueError, match=r"grid starts at \d+, but .* at 80: start there"):
        given |= {GRIDS[method]: times, "shape": (16,), "progress": False}
        distill(mixture_denoiser(), method, nfe=4, **given)


def test_auto_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them did the whole work and wrote the same files; by a budget of time with other results."""
    monkeypatch.setattr(World, "current", classmethod(lambda cls: cls(1, 2)))
    with pytest.raises(ValueError, match="'auto' runs in one process, and here are 2"):
        distill(mixture_denoiser(), nfe=4, shape=(16,), progress=False)


def test_grids_without_a_finite_loss_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Ld3Settings(nfe=4, loss="l2", init="best")
    learner = Ld3(mixture_denoiser(), settings)
    assert learner.choose_start(lambda _: 1.0) == "polynomial"
    with pytest.raises(FloatingPointError, match="the loss on every handcrafted grid is nan"):
        learner.choose_start(lambda _: float("nan"))


def test_dode_takes_times_as_a_tensor() -> None:
    times = torch.tensor([80.0, 10.0, 3.0, 1.0, 0.002], dtype=torch.float64)
    runs = [
        distill(
            mixture_denoiser(), "dode", nfe=4, shape=(16,), grid=grid, batch=8, keep="learned",
            progress=False,
        )
        for grid in (times, times.tolist())
    ]  # fmt: skip
    tables = [run.policy.static_table() for run in runs]
    assert tables[0] is not None and tables[1] is not None
    assert torch.equal(tables[0].grid, times) and torch.equal(tables[0].b, tables[1].b)

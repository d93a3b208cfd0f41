"""``accelerate``: the pipeline's own scheduler steps in for ours, not for the caller's errors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine.integrations.diffusers import accelerate  # noqa: E402
from dlms_engine.integrations.pipelines import acceleration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Cancelled(RuntimeError):
    pass


class Once:
    """A callback that cancels its second step, and only the first time."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, _pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> Any:
        self.steps += 1
        if self.steps == 2:
            raise Cancelled
        return tensors

    def method(self, *arguments: Any) -> Any:
        return self(*arguments)


def _closure(one: Once) -> Any:
    return lambda *arguments: one(*arguments)


WAYS: dict[str, Any] = {
    "method": lambda: Once().method,
    "object": Once,
    "partial": lambda: functools.partial(Once().method),
    "function": lambda: _closure(Once()),
}


def called(pipe: Any, **more: Any) -> Any:
    return pipe(**tiny.sd_inputs(), height=16, width=16, num_inference_steps=3, **more)


@pytest.mark.parametrize("way", WAYS)
def test_a_callback_that_raises_ends_the_call(way: str) -> None:
    """The call went on with the pipeline's own scheduler, and kept it for calls like this."""
    pipe = tiny.sd()
    accelerated = accelerate(pipe, solver="unipc")
    with pytest.raises(Cancelled):
        called(pipe, callback_on_step_end=WAYS[way]())
    assert "its own scheduler" not in str(accelerated.report())
    called(pipe)
    called(pipe)
    assert accelerated.report().whole_loop


def test_a_cancellation_that_is_swallowed_is_seen(monkeypatch: Any) -> None:
    monkeypatch.setattr(acceleration, "is_callers", lambda *_: False)
    pipe = tiny.sd()
    accelerated = accelerate(pipe, solver="unipc")
    called(pipe, callback_on_step_end=Once())
    assert "its own scheduler" in str(accelerated.report())


def test_memory_that_was_short_once_changes_no_solver() -> None:
    pipe = tiny.sd()
    accelerated = accelerate(pipe, solver="unipc")
    short = [True]

    def hook(*_: Any) -> None:
        if short.pop() if short else False:
            raise torch.OutOfMemoryError

    pipe.unet.register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        called(pipe)
    called(pipe)
    assert "its own scheduler" not in str(accelerated.report())

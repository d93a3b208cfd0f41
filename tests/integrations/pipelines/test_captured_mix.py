"""A captured run is replayed for other mixing weights only if it does the same operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402

from dlms_engine.integrations.diffusers import accelerate  # noqa: E402
from dlms_engine.integrations.pipelines import whole_loop  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Mixing(diffusers.DDIMPipeline):
    """The network's output times ``gain``, and ``share`` of the latents."""

    @torch.no_grad()
    def __call__(self, gain: float = 1.0, share: float = 0.0) -> Tensor:
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            out = gain * self.unet(x, t).sample + share * x
            x = self.scheduler.step(out, t, x).prev_sample
        return x


class Graphs:
    """Replays the first body of a key with new inputs, as a CUDA graph does."""

    def __init__(self) -> None:
        self.bodies: dict[Any, Any] = {}

    def __call__(
        self, _cache: Any, _networks: Any, options: Any, body: Any, inputs: dict[str, Tensor]
    ) -> Tensor:
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        out: Tensor = self.bodies.setdefault((options, shapes), body)(inputs)
        return out


def errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of the replayed loop against step by step, for one kind of mix after the other."""
    monkeypatch.setattr(whole_loop, "run_captured", Graphs())
    pipe = tiny.unconditional("DDIM")
    pipe.__class__ = Mixing
    accelerated, found = accelerate(pipe, solver="ddim"), []
    for mix in ({}, {"gain": 0.5}, {"gain": 0.5, "share": 0.25}, {"share": 0.25}):
        recorded, replayed = pipe(**mix), pipe(**mix)
        assert accelerated.report().whole_loop
        found.append(float((recorded - replayed).abs().max() / recorded.abs().max()))
    return found


def test_other_operations_are_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(errors(monkeypatch)) < 1e-5


def test_a_run_without_an_operation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole_loop.WholeLoop.run

    def unnamed(self: Any, cache: Any) -> Tensor:
        """The key says nothing of the mix; the body does what it always does."""
        chosen = [self._left_out(n) for n in range(len(self.weights))]
        self._left_out = lambda n: chosen[n] if self.body_runs else None
        self.body_runs = False
        body = self._body

        def running(inputs: Any) -> Tensor:
            self.body_runs = True
            return body(inputs)

        self._body = running
        return right(self, cache)

    monkeypatch.setattr(whole_loop.WholeLoop, "run", unnamed)
    assert max(errors(monkeypatch)) > 1e-2

"""A pipeline's denoising loop in one run of the engine, behind the pipeline's own signature.

The pipeline prepares everything as always. Its network calls are answered by a probe, from which
the scheduler reads how the pipeline mixes the guidance branches. It then runs every row itself at
the first step, guidance fused and, on CUDA, as one graph; the rest of the pipeline's loop is idle.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.cuda_graph import GraphedLoop
from ...engine.cuda_graph_cache import GraphCache
from ...ops import layout
from .probe import Loop, NotPlain
from .runner import Runner

log = logging.getLogger("dlms_engine")
# arguments with which a pipeline does more per step than guidance, and the values that mean "off"
STEPWISE: dict[str, Any] = {
    "callback": None,
    "callback_on_step_end": None,
    "denoising_end": None,
    "guidance_rescale": 0.0,
    "ip_adapter_image": None,
    "ip_adapter_image_embeds": None,
    "mask_image": None,
    "skip_guidance_layers": None,
    "true_cfg_scale": 1.0,
}


class LoopRunner(Runner):
    """Runs all rows at the first ``advance``; later ones hand the finished latents back."""

    loop: Loop
    cache: GraphCache
    _final: Tensor | None = None

    def begin(self, index: int) -> None:
        # the loop scales the network's input itself, whatever the pipeline does
        self._was_scaled = self._was_scaled or self.loop.enabled
        super().begin(index)

    def advance(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        if not self.loop.enabled or self._policy is not None:
            return super().advance(n, output, sample)
        if self._final is None:
            guidance = self.loop.guidance_of(output, sample)
            self._final = self._all(n, sample, guidance).to(sample.dtype)
        return self._final

    @torch.no_grad()
    def _all(self, begin: int, sample: Tensor, guidance: float | None) -> Tensor:
        loop, plan = self.loop, self._plan
        state = torch.float64 if sample.dtype == torch.float64 else torch.float32
        rows = plan.packed.clone()
        rows[:-1, layout.C_IN] = torch.tensor(plan.c_in[1:], dtype=torch.float64)
        rows[:, layout.GUIDANCE] = 1.0 if guidance is None else guidance
        scale = loop.time_scale(self.host_timesteps[begin], self._model.levels)
        times = (self._model.timestep(self._rows.times) * scale).to(torch.float32)

        def network(n: int, x: Tensor, inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
            asked = x if guidance is None else torch.cat([x, x])
            out = loop.evaluate(asked, inputs["times"][n], dict(inputs)).to(x.dtype).contiguous()
            if guidance is None:
                return out
            first, second = out.chunk(2)
            return first.contiguous(), second.contiguous()

        graphed = GraphedLoop(
            network,
            None,
            sample.shape,
            plan.depth,
            self._rows.count - begin,
            dtype=state,
            network_dtype=sample.dtype,
            network=loop.network,
            cache=self.cache,
            options=(loop.constants(), guidance is None),
        )
        return graphed.run(
            sample.to(state),
            rows[begin:].to(device=sample.device, dtype=state),
            first_scale=plan.c_in[begin],
            inputs={**loop.tensors(), "times": times[begin:].to(sample.device)},
        )


class Acceleration:
    """What ``accelerate`` changed on a pipeline; ``undo`` changes it back."""

    def __init__(self, pipe: Any, network: nn.Module, scheduler: Any) -> None:
        self.pipe = pipe
        self.network = network
        self._class = type(pipe)
        self._scheduler = pipe.scheduler
        self._own = scheduler
        self.loop = Loop(network)
        self.loop.install()
        scheduler.run_with(self.loop, GraphCache())
        pipe.scheduler = scheduler
        pipe.__class__ = _accelerated(self._class, self)

    def undo(self) -> None:
        """The pipeline is what it was before ``accelerate``."""
        if self.pipe is None:
            return
        self.pipe.__class__ = self._class
        self.pipe.scheduler = self._scheduler
        self.loop.uninstall()
        self._own.unwatch()
        self.pipe = None

    def call(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's call: the whole loop at once if its arguments allow, else step by step."""
        reason = _stepwise(kwargs)
        if pipe.scheduler is not self._own:
            reason = "the pipeline's scheduler was replaced"
        elif self._own.watched:
            reason = "the solver's rows are per sample"
        if reason is None:
            with _rewound(kwargs) as rewind:
                try:
                    return self._run(pipe, True, args, kwargs)
                except NotPlain as exc:
                    reason = str(exc)
                    rewind()
        log.info("running step by step: %s", reason)
        return self._run(pipe, False, args, kwargs)

    def _run(self, pipe: Any, whole: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.loop.reset(whole)
        scale = kwargs.get("guidance_scale")
        self.loop.guidance = None if scale is None else float(scale)
        try:
            return self._class.__call__(pipe, *args, **kwargs)
        finally:
            self.loop.reset(False)


def _stepwise(arguments: dict[str, Any]) -> str | None:
    for name, neutral in STEPWISE.items():
        value = arguments.get(name, neutral)
        if value is not None and (neutral is None or value != neutral):
            return f"argument {name}"
    return None


@contextmanager
def _rewound(kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yields a function that puts the random generators back to where they are now."""
    given = kwargs.get("generator")
    generators = given if isinstance(given, list) else [given] if given is not None else []
    states = [g.get_state() for g in generators]
    shared = torch.get_rng_state()

    def rewind() -> None:
        torch.set_rng_state(shared)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    yield rewind


def _accelerated(cls: type[Any], acceleration: Acceleration) -> type[Any]:
    """A subclass with the same name and signature: special methods are looked up on the class."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return acceleration.call(self, args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})

"""Whether a denoiser made of a pipeline gives its scheduler what the pipeline gives it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ..scheduler.runner import Runner

CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 5e-2  # half precision
_Step = tuple[Tensor, Tensor, Tensor, float]  # what the scheduler was given, latents, time, c_in


class _Noting(Runner):
    """A run that keeps what its steps are given."""

    steps: list[_Step]

    def advance(self, n: int, output: Tensor, sample: Tensor) -> Tensor:
        plan = self.plan_of(self._prepared)
        given = self.shaped_output(output, sample)
        self.steps.append((given, sample, self.times[n], plan.c_in[n]))
        return super().advance(n, output, sample)


class _Listener:
    def __init__(self) -> None:
        self.steps: list[_Step] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return self

    def runner(self, *arguments: Any) -> Runner:
        """For the scheduler's ``set_timesteps``."""
        made = _Noting(*arguments)
        made.steps = self.steps
        return made


INSTEAD = (
    "a handcrafted solver runs there: "
    'DLMSScheduler.from_config(pipe.scheduler.config, solver="unipc")'
)


@torch.no_grad()
def run_steps(pipe: Any, listener: Any, arguments: dict[str, Any], steps: int) -> None:
    """``steps`` steps of ``pipe``, whose ``DLMSScheduler`` takes its runs from ``listener``.

    An image is not decoded where the pipeline can leave that out, and begins early enough for them.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    strength = arguments.get("strength", getattr(parameters.get("strength"), "default", None))
    if isinstance(strength, (int, float)) and 0 < strength < 1:
        steps = math.ceil(steps / strength)
    asked = {**arguments, "num_inference_steps": steps}
    kinds = [{"output_type": "latent"}, {}] if "output_type" in parameters else [{}]
    pipe.scheduler.run_with(listener)
    try:
        for kind in kinds:
            try:
                pipe(**{**kind, **asked})
                return
            except ValueError as exc:
                if kind is kinds[-1] or "output_type" not in str(exc):
                    raise
    finally:
        pipe.scheduler.run_with(None)


@torch.no_grad()
def proved(pipe: Any, denoiser: Denoiser, arguments: dict[str, Any]) -> None:
    """Two steps of the pipeline, which has a ``DLMSScheduler``; the denoiser repeats them.

    Raises:
        ValueError: the pipeline gives its scheduler something else, so that a solver distilled on this
            denoiser would be one for another model.
    """
    listener, name = _Listener(), type(pipe).__name__
    sign = pipe.scheduler.noise_model.sign  # the engine's networks predict the opposite of some
    run_steps(pipe, listener, arguments, 2)
    for n, (given, sample, time, c_in) in enumerate(listener.steps):
        difference = _difference(denoiser, sign * given, sample, time, c_in)
        if not difference <= CLOSE.get(denoiser.network_dtype or sample.dtype, ROUGH):
            raise ValueError(
                f"{name} gives its scheduler something else than its networks' outputs with guidance "
                f"(relative difference {difference:.1e} at step {n}): it changes them while it runs, as "
                "perturbed attention does, or they remember earlier calls. Distilling for it is not "
                f"supported; {INSTEAD}"
            )


def _difference(
    denoiser: Denoiser, given: Tensor, sample: Tensor, time: Tensor, c_in: float
) -> float:
    """Relative to the largest value."""
    first = getattr(denoiser, "first_sample", None)
    if first is not None:
        first(0)
    x = (sample.float() * c_in).to(denoiser.network_dtype or sample.dtype)
    output = denoiser.network_output(x, denoiser._noise_level(time))
    mixed = denoiser.combine(output, torch.float32)
    scale = float(given.float().abs().max().clamp(min=1e-12))
    return float((mixed - given.float()).abs().max()) / scale

"""Whether a denoiser made of a pipeline gives its scheduler what the pipeline gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ..scheduler.probe import first_argument
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
        self.steps.append((given, sample, self._rows.times[n], plan.c_in[n]))
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


@torch.no_grad()
def proved(pipe: Any, denoiser: Denoiser, arguments: dict[str, Any]) -> None:
    """Two steps of the pipeline, which has a ``DLMSScheduler``; the denoiser repeats them.

    Raises:
        ValueError: the pipeline gives its scheduler something else, so that a solver distilled on this
            denoiser would be one for another model.
    """
    listener, name = _Listener(), type(pipe).__name__
    pipe.scheduler.run_with(listener)
    try:
        pipe(**{**arguments, "num_inference_steps": 2})
    finally:
        pipe.scheduler.run_with(None)
    for n, (given, sample, time, c_in) in enumerate(listener.steps):
        difference = _difference(denoiser, given, sample, time, c_in)
        if difference is None:
            raise ValueError(
                f"{name}'s network is called with more than the latents {tuple(sample.shape)}: "
                "distilling for such pipelines is not supported"
            )
        if not difference <= CLOSE.get(denoiser.network_dtype or sample.dtype, ROUGH):
            raise ValueError(
                f"{name} gives its scheduler something else than its network's output with guidance "
                f"(relative difference {difference:.1e} at step {n}): distilling for it is not supported"
            )


def _difference(
    denoiser: Denoiser, given: Tensor, sample: Tensor, time: Tensor, c_in: float
) -> float | None:
    """Relative to the largest value; None where the network's own input has another shape."""
    first = getattr(denoiser, "first_sample", None)
    if first is not None:
        first(0)
    x = (sample.float() * c_in).to(denoiser.network_dtype or sample.dtype)
    call = denoiser.network.call
    if first_argument(call.args, call.kwargs).shape[1:] != sample.shape[1:]:
        return None
    output = denoiser.network_output(x, denoiser._noise_level(time))
    mixed = denoiser.combine(output, torch.float32)
    scale = float(given.float().abs().max().clamp(min=1e-12))
    return float((mixed - given.float()).abs().max()) / scale

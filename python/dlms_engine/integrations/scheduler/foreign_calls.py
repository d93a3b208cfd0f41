"""What pipelines ask of other schedulers than ours: given where it can be, refused by name where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex, overload

from torch import Tensor

OF_CLASSES = {
    "original_inference_steps": "LCMScheduler and TCDScheduler skip steps of such a schedule",
    "per_token_timesteps": "FlowMatchEulerDiscreteScheduler steps each token from a time of its own",
    "pred_original_sample": "EDMEulerScheduler steps from a data prediction",
}
"""Arguments that pipelines of diffusers pass, and the classes that have a use for them."""


def refuse_other(method: str, other: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments of ``scheduler.<method>`` that ours does not have."""
    for name in other:
        why = f": {OF_CLASSES[name]}" if name in OF_CLASSES else ""
        raise ValueError(
            f"the pipeline passes {name} to scheduler.{method}, which DLMSScheduler does not have{why}; "
            "keep the pipeline's own scheduler"
        )


def refuse_level(sample: Tensor) -> None:
    """Raises ValueError for one number in place of latents.

    The latent upscaler scales a noise level to turn its network's output into a data prediction: that
    holds for Euler's states, x0 + sigma z, and not for alpha x0 + sigma z.
    """
    if sample.ndim == 0:
        raise ValueError(
            "the pipeline scales a noise level as it scales latents, which is right for "
            "EulerDiscreteScheduler's states alone; keep the pipeline's own scheduler"
        )


class StepTuple(tuple[Tensor, ...]):
    """``(latents,)``, whose item 1, the data prediction, is made when it is read by its number."""

    _predicted: Callable[[], Tensor]

    @classmethod
    def of(cls, latents: Tensor, predicted: Callable[[], Tensor]) -> StepTuple:
        """The two items; ``predicted`` is called for the second."""
        made = cls((latents,))
        made._predicted = predicted
        return made

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice, /) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> Tensor | tuple[Tensor, ...]:
        if index == 1:
            return self._predicted()
        return super().__getitem__(index)


def without_missing(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``config`` without those of ``names`` that are None: the reader has defaults of its own."""
    left_out = {name for name in names if config.get(name) is None}
    return {key: value for key, value in config.items() if key not in left_out}

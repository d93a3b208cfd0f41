"""Lets a scheduler see the network's bottleneck and tell every sample its own time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models.denoiser import find_module
from ...models.tap import first_tensor

TIME_ARGUMENTS = ("timestep", "timesteps", "t")


class Watch:
    """Hooks on a pipeline's network: reads the bottleneck, replaces the time argument.

    A pipeline hands one time to the whole batch; a solver whose times are per sample needs more.
    Copies of the scheduler share the hooks: the network is not copied with them.

    Args:
        network: the pipeline's ``unet`` or ``transformer``.
        features: module path of the bottleneck, e.g. ``"mid_block"``.
    """

    def __init__(self, network: nn.Module, features: str) -> None:
        self.ratio: Tensor | None = None  # [B] own time / the pipeline's, next call; None is 1
        self._bottleneck: Tensor | None = None
        self._handles = [
            find_module(network, features).register_forward_hook(self._keep),
            network.register_forward_pre_hook(self._replace_time, with_kwargs=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return self

    def remove(self) -> None:
        """Takes the hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reset(self) -> None:
        """Forgets the last run."""
        self.ratio = self._bottleneck = None

    def features(self, batch: int) -> Tensor:
        """``[batch, F]`` channel mean of the bottleneck, conditional half under guidance."""
        raw = self._bottleneck
        if raw is None:
            raise RuntimeError(
                "the watched network was not called before step(), or its bottleneck returned no tensor: "
                "watch the network this pipeline runs, scheduler.watch(pipe.unet)"
            )
        if raw.shape[0] % batch:
            raise ValueError(f"bottleneck of {raw.shape[0]} samples for {batch} latents")
        raw = raw[-batch:]  # pipelines put the conditional half last
        pooled = raw.float().mean(dim=1) if raw.ndim > 2 else raw.float()
        return pooled.flatten(1)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        value = first_tensor(output)
        self._bottleneck = None if value is None else value.detach()

    def _replace_time(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.ratio is None:
            return None
        for name in TIME_ARGUMENTS:
            if name in kwargs:
                return args, {**kwargs, name: self._own(kwargs[name], args, kwargs)}
        if len(args) > 1:
            return (args[0], self._own(args[1], args, kwargs), *args[2:]), kwargs
        raise ValueError(f"the watched network was called without one of {TIME_ARGUMENTS}")

    def _own(self, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The time argument times the ratio: whatever unit the pipeline uses, and never rounded."""
        assert self.ratio is not None
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        assert isinstance(sample, Tensor)
        copies = sample.shape[0] // self.ratio.shape[0]
        ratio = self.ratio.to(device=sample.device, dtype=torch.float32).repeat(copies)
        return torch.as_tensor(given, device=sample.device).to(torch.float32) * ratio

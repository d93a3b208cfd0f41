"""Finding out what a pipeline does between its network and its scheduler, by a probe."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

VALUES = (1.0, 3.0)  # the probe's two branches; exact in half precision


class NotPlain(ValueError):
    """The pipeline does more than guidance between the network and the scheduler."""


class ProbeLoop:
    """A pipeline's network that answers with probes until the scheduler runs the real loop.

    Attributes:
        call: arguments of the first call since ``reset``; None before.
        guidance: what the pipeline says its guidance scale is, if it says.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.forward: Callable[..., Any] = network.forward
        self._replaced = network.__dict__.get("forward")  # an offloading hook's, for instance
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.enabled = False
        self.guidance: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ProbeLoop:
        return self  # copies of the scheduler share the network

    def install(self) -> None:
        """Puts ``answer`` in the place of the network's ``forward``."""
        self.network.forward = self.answer  # type: ignore[method-assign]

    def uninstall(self) -> None:
        """Puts back what was there."""
        if self._replaced is None:
            del self.network.forward
        else:
            self.network.forward = self._replaced  # type: ignore[method-assign]

    def reset(self, enabled: bool) -> None:
        """Before a call of the pipeline; disabled, the network is what it was."""
        self.enabled, self.call, self.guidance = enabled, None, None

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for ``network.forward``: one value for each half of the batch."""
        if not self.enabled:
            return self.forward(*args, **kwargs)
        if self.call is None:
            self.call = args, kwargs
        sample = first_argument(args, kwargs)
        shape = list(sample.shape)
        channels = getattr(getattr(self.network, "config", None), "out_channels", None)
        if channels and sample.ndim == 4:  # a learned variance, or masks in the input
            shape[1] = channels
        probe = sample.new_full(shape, VALUES[1])
        probe[: sample.shape[0] // 2] = VALUES[0]
        return SimpleNamespace(sample=probe) if kwargs.get("return_dict", True) else (probe,)

    def tensors(self) -> dict[str, Tensor]:
        """The remembered arguments that are tensors, by position; the sample and time excepted."""
        leaves, _ = self._flat()
        return {f"argument{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

    def constants(self) -> str:
        """Everything else about the remembered call."""
        leaves, spec = self._flat()
        return repr(([leaf for leaf in leaves if not isinstance(leaf, Tensor)], spec))

    def _flat(self) -> tuple[list[Any], Any]:
        assert self.call is not None
        args, kwargs = self.call
        names = ("sample", "hidden_states", "timestep", "timesteps")
        rest = {k: v for k, v in kwargs.items() if k not in names}
        return pytree.tree_flatten((args[2:], rest))

    def evaluate(self, sample: Tensor, time: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The real network on ``sample`` at ``time`` (0-dim), other arguments from ``tensors``."""
        assert self.call is not None
        args, kwargs = self.call
        leaves, spec = self._flat()
        leaves = [tensors.get(f"argument{i}", leaf) for i, leaf in enumerate(leaves)]
        more, rest = pytree.tree_unflatten(leaves, spec)
        given = self.given_time()
        if isinstance(given, Tensor) and given.ndim:
            time = time.expand(sample.shape[0])
        if args:
            rest = rest if len(args) > 1 else {**rest, _time_key(kwargs): time}
            positional = (sample, time, *more) if len(args) > 1 else (sample,)
        else:
            positional = ()
            key = "sample" if "sample" in kwargs else "hidden_states"
            rest = {**rest, key: sample, _time_key(kwargs): time}
        out = self.forward(*positional, **rest)
        value = out if isinstance(out, Tensor) else out[0]
        assert isinstance(value, Tensor)
        return value

    def given_time(self) -> Any:
        """The time argument of the remembered call, as the pipeline gave it."""
        assert self.call is not None
        args, kwargs = self.call
        return args[1] if len(args) > 1 else kwargs[_time_key(kwargs)]

    def time_scale(self, timestep: float, levels: int) -> float:
        """Factor from the scheduler's times to the network's: FLUX divides by 1000.

        Raises:
            NotPlain: neither 1 nor 1 / levels, or parts of a sample have times of their own.
        """
        times = torch.as_tensor(self.given_time()).reshape(-1)
        if bool((times != times[0]).any()):
            raise NotPlain("the network is called with several times at once")
        given = float(times[0])
        for scale in (1.0, 1.0 / levels):
            # half-precision pipelines hand over rounded times; ours are not rounded
            if abs(given - timestep * scale) <= 1e-2 * abs(timestep * scale):
                return scale
        raise NotPlain(f"the network is called with {given}, the scheduler said {timestep}")


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The network's sample, whatever it is called."""
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    if not isinstance(sample, Tensor):
        raise NotPlain(
            f"the network is called with a {type(sample).__name__} of latents, not a tensor"
        )
    return sample


def _time_key(kwargs: dict[str, Any]) -> str:
    return "timesteps" if "timesteps" in kwargs else "timestep"

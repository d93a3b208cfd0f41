"""A network made to answer E[x0 | x, t]: process, prediction type, guidance and feature tap."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..processes import Process, edm_coordinates
from ..processes.base import as_level
from ..support.versioned import Versioned
from .guidance import Branches, check_guidance, doubled
from .preconditioning import (
    BLIND_AT_NOISE,
    PREDICTIONS,
    TIME_INPUTS,
    NamedTime,
    NetworkPrediction,
    Preconditioning,
    TimeInput,
    check_positive,
    coefficients,
    like_times,
    time_function,
    usual_prediction,
)
from .tap import (
    FeatureTap,
    NetworkCalls,
    Owner,
    buffer_dtype,
    called,
    find_module,
    first_parameter,
    no_bottleneck,
    unwrap,
)
from .thresholding import quantile, thresholded
from .wrapping import check_wrapping

__all__ = [
    "BLIND_AT_NOISE",
    "PREDICTIONS",
    "TIME_INPUTS",
    "Denoiser",
    "NetworkPrediction",
    "Preconditioning",
    "TimeInput",
    "find_module",
    "per_sample",
    "quantile",
    "unwrap",
    "usual_prediction",
]


class Denoiser(Versioned, nn.Module):
    """Wraps ``network(x, c_noise, **conditions)`` so that every solver sees the same thing.

    Args:
        network: any callable; ``x`` is ``[B, ...]``, ``c_noise`` is ``[B]``.
        process: alpha, sigma and time range of the model.
        prediction: what the network returns: ``"data"`` (E[x0 | x], called with t itself),
            ``"noise"``, ``"velocity"`` (alpha * noise - sigma * data), ``"flow"`` (noise - data),
            ``"reverse_flow"`` (data - noise, of models whose data lie at their own t = 1) or
            ``"edm"`` (Karras et al. 2022, Table 1, c_noise = ln(sigma) / 4). None is what is usual
            for the process: edm for EDM, flow for RectifiedFlow, noise for the others.
        sigma_data: standard deviation of the data, EDM preconditioning only.
        features: path of the module inside ``network`` whose output is the bottleneck
            (``"mid_block"``, ``"unet.mid_block"``); None turns the tap off.
        guidance_scale: classifier-free guidance, F = F_uncond + scale * (F_cond - F_uncond);
            one network call on the doubled batch ``[uncond; cond]``.
        unconditional: keyword tensors of the unconditional branch (needed with guidance), nested as
            the conditions are. A key that a call does not give the network is refused there.
        time_input: how the network takes the time t ``[B]`` when the default is not right
            (defaults: t for data, flow; the model's index for ``VPDiscrete``; ln(sigma)/4 for edm):
            ``"t"``, ``"reversed"`` (1 - t: data at 1), ``"sigma"`` (sigma / alpha), ``"log_sigma"``
            (its logarithm), ``"index"`` (the nearest index of a ``VPDiscrete`` as int64, for networks
            that read a table of embeddings by it) or a function of t.
        time_scale: factor of a ``time_input`` given by name, such as 1000.
        dynamic_thresholding: quantile in (0, 1] of |data prediction| per sample used to clip it
            (Saharia et al. 2022); None (default) is off. It changes the ODE: pixel models only.

    Raises:
        TypeError: the network is no callable, the process no process.
        ValueError: unknown prediction or time input, a feature path not found, guidance without
            ``unconditional``. A noise or edm prediction where alpha = 0 determines nothing: it is
            refused when such a time comes.
    """

    holds_branches = False
    """Whether the network itself knows what it is given in the two halves of a guided batch."""

    def __init__(
        self,
        network: Callable[..., Any],
        process: Process,
        prediction: NetworkPrediction | None = None,
        *,
        sigma_data: float = 0.5,
        features: str | None = None,
        guidance_scale: float | None = None,
        unconditional: Mapping[str, Any] | None = None,
        time_input: TimeInput | None = None,
        time_scale: float | None = None,
        dynamic_thresholding: float | None = None,
    ) -> None:
        super().__init__()
        check_wrapping(network, process)
        prediction = usual_prediction(process) if prediction is None else prediction
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}, expected one of {PREDICTIONS}")
        check_positive("sigma_data", sigma_data)
        if dynamic_thresholding is not None and not 0.0 < dynamic_thresholding <= 1.0:
            raise ValueError(
                f"dynamic_thresholding is {dynamic_thresholding}, expected a quantile in (0, 1]"
            )
        self.network = network
        self.process = process
        self.prediction: NetworkPrediction = prediction
        self.sigma_data = float(sigma_data)
        self.unconditional = dict(unconditional or {})
        self.guidance_scale = guidance_scale
        self.dynamic_thresholding = dynamic_thresholding
        self.network_process: Process = process  # of its input, where the state is x / alpha
        self._branches = Branches()
        self._time_input = time_function(process, time_input, time_scale)
        self._tap = FeatureTap()
        self.calls = NetworkCalls(self._tap)
        self.features = features
        self._owner = Owner()
        if features is not None:
            hook = find_module(self.network, features).register_forward_hook(self._tap)
            # the network may outlive this object, and its hooks would keep every bottleneck alive
            weakref.finalize(self._owner, hook.remove).atexit = False

    @property
    def guidance_scale(self) -> float | None:
        """Weight of the conditional branch; None is no guidance. It may be set between runs."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float | None) -> None:
        check_guidance(scale, bool(self.unconditional) or self.holds_branches)
        self._guidance_scale = scale

    # -- feature tap ------------------------------------------------------------------------

    @property
    def bottleneck(self) -> Tensor:
        """Raw output of the tapped module in this thread's last call, conditional half only.

        RuntimeError: there is none, as after a sampler's run on a GPU, which may be a graph's.
        """
        tensor = self._tap.value
        if tensor is None:
            raise RuntimeError(no_bottleneck(self.features, self.network))
        return tensor[tensor.shape[0] // 2 :] if self.guidance_scale is not None else tensor

    @property
    def last_features(self) -> Tensor:
        """Channel mean of the bottleneck, flattened: ``[B, H * W]`` (AMED section 3.2).

        float32, or float64 from a float64 network.
        """
        raw = self.bottleneck
        wide = raw if raw.dtype == torch.float64 else raw.float()
        return (wide.mean(dim=1) if raw.ndim > 2 else wide).flatten(1)

    # -- coordinates --------------------------------------------------------------------------

    def in_edm_coordinates(self) -> Denoiser:
        """The same network for the state x / alpha, whose time is its noise level sigma / alpha.

        ValueError: alpha is 0 at the start.
        """
        twin = copy.copy(self)
        twin.process = edm_coordinates(self.network_process)
        return twin

    # -- coefficients -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the network lies: the device of its first parameter or buffer, else the CPU."""
        if isinstance(self.network, nn.Module):
            tensors = itertools.chain(self.network.parameters(), self.network.buffers())
            for tensor in tensors:  # the first one: a network of thousands is not listed
                return tensor.device
        return torch.device("cpu")

    @property
    def network_dtype(self) -> torch.dtype | None:
        """Dtype of the network's parameters, else that of its buffers (see ``buffer_dtype``).

        None for a network that does not say: without either, or with float8 alone.
        """
        if not isinstance(self.network, nn.Module):
            return None
        parameter = first_parameter(self.network)
        if parameter is None:
            return buffer_dtype(self.network)
        return None if parameter.dtype.itemsize == 1 else parameter.dtype

    def _noise_level(self, t: Tensor) -> Tensor:
        if self._time_input is not None:
            return like_times(self._time_input(t), t)
        if self.prediction == "edm":
            return torch.log(self.network_process.sigma(t) / self.network_process.alpha(t)) / 4
        timestep = getattr(self.network_process, "timestep", None)
        if timestep is not None and self.prediction != "data":
            return cast(Tensor, timestep(t))
        return t

    def preconditioning(
        self, t: Tensor, prediction: Literal["data", "noise"] = "data"
    ) -> Preconditioning:
        """Coefficients at times ``t`` (any shape, float64) for the ring quantity asked for."""
        t, process = t.to(torch.float64), self.network_process
        if process is not self.process:
            t = process.inverse_sigma(t).clamp(process.t_min, process.t_max)
        alpha, sigma = process.alpha(t), process.sigma(t)
        if self.prediction in BLIND_AT_NOISE:
            self._refuse_blind(alpha)
        c_skip, c_out, c_in = coefficients(
            self.prediction, self.sigma_data, alpha, sigma, prediction
        )
        if process is not self.process:  # of x / alpha; the predictions are the same
            c_skip, c_in = alpha * c_skip, alpha * c_in
        return Preconditioning(c_skip, c_out, c_in, self._noise_level(t))

    def _refuse_blind(self, alpha: Tensor) -> None:
        """Only where looking costs nothing: not on a GPU, not inside a trace."""
        if alpha.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool((alpha == 0).any()):
            name = type(self.process).__name__
            raise ValueError(
                f"prediction is {self.prediction!r} and alpha is 0 at t = {self.process.t_max}: the "
                "state is pure noise there and such a prediction does not determine the data; "
                f"start at {name}(t_max=0.999), or choose another prediction"
            )

    # -- calls ------------------------------------------------------------------------------

    def batch_conditions(self, batch: int) -> dict[str, Any]:
        """Keyword arguments of the network that the denoiser itself gives to the next batch.

        A captured run takes them as inputs; everywhere else ``network_output`` adds them.
        """
        return {}

    def network_output(
        self, network_input: Tensor, c_noise: Tensor, **conditions: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The raw network on ``network_input`` ``[B, ...]``, or ``(F_uncond, F_cond)``.

        ``c_noise`` is a scalar or ``[B]``; it is handed over in float32 (float64 for float64
        inputs), never in half precision, where times such as 750 are rounded.

        Raises:
            TypeError, ValueError: the network returned no tensor like its input.
        """

        def work(given: Mapping[str, Tensor], kept: dict[str, Any]) -> tuple[Tensor, ...]:
            return self._branch_outputs(given["x"], given["level"], kept)

        level = c_noise.to(network_input.device)
        inputs = {"x": network_input, "level": level}
        outputs = self.calls.as_one(self, ("network",), work, inputs, conditions)
        return outputs[0] if self.guidance_scale is None else (outputs[0], outputs[1])

    def _branch_outputs(
        self, network_input: Tensor, level: Tensor, conditions: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """The network's output, with guidance both branches' in one call."""
        if self.features is not None:
            self._tap.keep(None)  # a module that this call does not run has no output of it
        wide = torch.float64 if network_input.dtype == torch.float64 else torch.float32
        batch = network_input.shape[0]
        level = level.to(wide)
        if isinstance(self._time_input, NamedTime) and self._time_input.whole:
            level = level.round().to(torch.int64)
        if self.guidance_scale is None:
            return (called(self.network, network_input, level.expand(batch), conditions),)
        twofold = self._branches.joined(self.unconditional, conditions, doubled(batch))
        both = torch.cat([network_input, network_input])
        each = level.expand(batch)
        twice = torch.cat([each, each]) if level.ndim else level.expand(2 * batch)
        out = called(self.network, both, twice, twofold)
        return out[:batch], out[batch:]  # chunk(2) would tie an exported graph to this batch

    def unconditional_read(self, conditions: Mapping[str, Any]) -> list[Tensor]:
        """The unconditional branch's tensors that a call with ``conditions`` reads, and where."""
        if self.guidance_scale is None:
            return []
        return self._branches.read(self.unconditional, conditions)

    def combine(self, output: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """Mixes the guidance branches: F_uncond + scale * (F_cond - F_uncond), in ``dtype``."""
        if isinstance(output, Tensor):
            return output.to(dtype)
        uncond, conditional = (part.to(dtype) for part in output)
        scale = 1.0 if self.guidance_scale is None else self.guidance_scale
        return uncond + scale * (conditional - uncond)

    def predict(
        self,
        x: Tensor,
        t: Tensor | float,
        prediction: Literal["data", "noise"] = "data",
        **conditions: Any,
    ) -> Tensor:
        """Data or noise prediction ``[B, ...]`` at ``x`` ``[B, ...]`` and time ``t`` (scalar, [B])."""

        def work(given: Mapping[str, Tensor], kept: dict[str, Any]) -> tuple[Tensor, ...]:
            return (self._predicted(given["x"], given["t"], prediction, kept),)

        inputs = {"x": x, "t": as_level(t).to(x.device)}
        return self.calls.as_one(self, ("predict", prediction), work, inputs, conditions)[0]

    def _predicted(
        self,
        x: Tensor,
        times: Tensor,
        prediction: Literal["data", "noise"],
        conditions: dict[str, Any],
    ) -> Tensor:
        pre = self.preconditioning(times, prediction)
        scaled = (per_sample(pre.c_in, x) * x).to(self.network_dtype or x.dtype)
        output = self.combine(self.network_output(scaled, pre.c_noise, **conditions), x.dtype)
        value = per_sample(pre.c_skip, x) * x + per_sample(pre.c_out, x) * output
        if self.dynamic_thresholding is None:
            return value
        alpha, sigma = (
            per_sample(v, x) for v in (self.process.alpha(times), self.process.sigma(times))
        )
        return thresholded(x, value, prediction, alpha, sigma, self.dynamic_thresholding)

    def forward(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        """E[x0 | x_t = x], same shape and dtype as ``x``."""
        return self.predict(x, t, "data", **conditions)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Casts a scalar or ``[B]`` coefficient to ``like``'s dtype, broadcastable over ``[B, ...]``."""
    value = value.to(device=like.device, dtype=like.dtype)
    return value if value.ndim == 0 else value.reshape(-1, *([1] * (like.ndim - 1)))

"""The noise model a diffusers scheduler config describes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...models.denoiser import Denoiser, NetworkPrediction, Preconditioning
from ...processes import EDM, Process, RectifiedFlow, VPDiscrete
from ...processes import as_float64 as f64
from ...support.values import is_finite_number, whole_number
from .spread import modifier_of

MOST_LEVELS = 100_000
"""Noise levels of a config: 100 times what networks are trained with."""

_Kind = Literal["vp", "flow", "edm"]
_NEARLY_ZERO = 2.0**-48  # an alpha_bar that float32 states cannot tell from zero
_NOISE = -12 * math.log(2)  # log alpha below which levels count as noise alone

_PREDICTIONS: dict[str, NetworkPrediction] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "velocity",
    "flow_prediction": "flow",
}
"""``prediction_type`` of a config -> the engine's name."""


def kind_of(config: Mapping[str, Any]) -> _Kind:
    """Flow if it predicts flow, EDM if it names ``sigma_data``, else variance preserving."""
    if config.get("prediction_type") == "flow_prediction" or config.get("flow_grid"):
        return "flow"
    return "edm" if config.get("sigma_data") is not None else "vp"


def make_betas(config: Mapping[str, Any]) -> Tensor:
    """``[num_train_timesteps]`` float32 betas of a config.

    float32 and in this order of operations because the networks were trained with these roundings.

    Raises:
        ValueError: unknown ``beta_schedule``, or a number that is none or beyond any model's.
    """
    count, schedule = _level_count(config), config["beta_schedule"]
    start, end = (_beta(config, key) for key in ("beta_start", "beta_end"))
    if config.get("trained_betas") is not None:
        betas = _trained_betas(config["trained_betas"])
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    elif schedule == "squaredcos_cap_v2":
        betas = _cosine_betas(count)
    elif schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, count)) * (end - start) + start
    else:
        raise ValueError(
            f"beta_schedule is {schedule!r}, expected 'linear', 'scaled_linear', "
            "'squaredcos_cap_v2' or 'sigmoid'; other schedules can be given as trained_betas"
        )
    return _zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def _level_count(config: Mapping[str, Any]) -> int:
    value = config["num_train_timesteps"]
    whole = isinstance(value, float) and value.is_integer()
    count = whole_number(int(value) if whole else value, "num_train_timesteps")
    if count > MOST_LEVELS:
        raise ValueError(f"num_train_timesteps is {count}, expected at most {MOST_LEVELS}")
    return count


def _beta(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if not is_finite_number(value) or value < 0:
        raise ValueError(f"{key} is {value!r}, expected a finite number >= 0")
    return float(value)


def _trained_betas(values: Any) -> Tensor:
    try:
        betas = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"trained_betas is {str(values)[:80]}, expected numbers") from error
    if betas.ndim != 1 or not 1 < len(betas) <= MOST_LEVELS:
        raise ValueError(
            f"trained_betas has shape {tuple(betas.shape)}, expected 2 to {MOST_LEVELS} numbers"
        )
    return betas


def _cosine_betas(count: int, highest: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17, capped."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(count)
    betas = [min(1 - alpha_bar((i + 1) / count) / alpha_bar(i / count), highest) for i in steps]
    return torch.tensor(betas, dtype=torch.float32)


def _zero_snr(betas: Tensor) -> Tensor:
    """Moves the last sqrt(alpha_bar) to zero (Lin et al. 2024, Algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def make_alphas_cumprod(config: Mapping[str, Any], betas: Tensor) -> Tensor:
    """float32 alpha_bar; with zero terminal SNR the last one is 2**-24, so that sigma is finite."""
    scale = config.get("snr_shift_scale")
    if scale is not None and float(scale) != 1.0:
        return _shifted_snr(config, betas, float(scale))
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod[-1] = 2**-24
    return alphas_cumprod


def _shifted_snr(config: Mapping[str, Any], betas: Tensor, scale: float) -> Tensor:
    """CogVideoX (Yang et al. 2024): the signal-to-noise ratio over ``scale``, then zero at the end."""
    plain = (
        betas
        if not config.get("rescale_betas_zero_snr")
        else make_betas({**config, "rescale_betas_zero_snr": False})
    )
    bar = torch.cumprod(1.0 - plain.double(), dim=0)
    bar = bar / (scale + (1 - scale) * bar)
    if config.get("rescale_betas_zero_snr"):
        root = bar.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        bar = root**2
        bar[-1] = 2**-24
    return bar.float()


def _levels(config: Mapping[str, Any], alphas_cumprod: list[float]) -> list[float]:
    """alpha_bar of the process; with zero terminal SNR the last one is what diffusers' class has.

    That is zero for DDIM, which divides by it only to predict noise, and 2**-24 for the others. Where
    the run never comes to the last level ("leading"), its neighbours keep their values.
    """
    values = list(alphas_cumprod)
    if config.get("rescale_betas_zero_snr") and len(values) > 1:
        divides = config["prediction_type"] == "epsilon"
        if config.get("solver") == "ddim" and not divides:
            values[-1] = min(_NEARLY_ZERO, values[-2] * (1 - 1e-6))
        elif config.get("timestep_spacing") == "leading" and modifier_of(config) is None:
            values[-1] = min(values[-1], values[-2] * (1 - 1e-6))
    return strictly_falling(values)


def strictly_falling(alphas_cumprod: list[float]) -> list[float]:
    """The same values, raised at the noisy end where they do not fall.

    With zero terminal SNR the replaced last value can lie above its neighbours, all of which are
    noise to any network.
    """
    values = list(alphas_cumprod)
    for i in range(len(values) - 2, -1, -1):
        if values[i] > values[i + 1]:
            break
        values[i] = values[i + 1] * (1 + 1e-6)
    return values


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """A process together with its network's prediction type and time input.

    Attributes:
        levels: training timesteps, the unit of the network's time (VP and flow).
        denoiser: holds the preconditioning only; it is never called.
        sign: -1 where the network predicts the negative: EDM's v-prediction, inverted flows.
        label: of an EDM noise level: ``"log"`` is 0.25 ln sigma, ``"atan"`` 2 / pi atan sigma.
    """

    kind: _Kind
    process: Process
    levels: int
    denoiser: Denoiser
    sign: float = 1.0
    label: str = "log"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], alphas_cumprod: Tensor | None) -> NoiseModel:
        """The model of a scheduler ``config``; ``alphas_cumprod`` is needed for VP only.

        Raises:
            ValueError: unknown ``prediction_type``.
        """
        name = config["prediction_type"]
        if name not in _PREDICTIONS:
            raise ValueError(f"prediction_type is {name!r}, expected one of {sorted(_PREDICTIONS)}")
        kind = kind_of(config)
        process: Process
        prediction: NetworkPrediction = _PREDICTIONS[name]
        sigma_data = 0.5
        sign = 1.0
        if kind == "flow":
            process = RectifiedFlow()
            sign = -1.0 if config.get("invert_sigmas") else 1.0
        elif kind == "edm":
            if name not in ("epsilon", "v_prediction"):
                raise ValueError(
                    f"prediction_type is {name!r}, expected 'epsilon' or 'v_prediction' with sigma_data"
                )
            sign = -1.0 if name == "v_prediction" else 1.0
            process = EDM(config.get("sigma_min") or 0.002, config.get("sigma_max") or 80.0)
            prediction, sigma_data = "edm", float(config["sigma_data"])
        else:
            assert alphas_cumprod is not None
            process = VPDiscrete(alphas_cumprod=_levels(config, alphas_cumprod.tolist()))
        denoiser = Denoiser(_never, process, prediction, sigma_data=sigma_data)
        label = str(config.get("sigma_label") or "log")
        if label not in ("log", "atan"):
            raise ValueError(f"sigma_label is {label!r}, expected 'log' or 'atan'")
        return cls(kind, process, int(config["num_train_timesteps"]), denoiser, sign, label)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseModel:
        return self  # immutable

    @functools.cached_property
    def key(self) -> str:
        """Equal for equal processes, whatever configs they come from."""
        return json.dumps(self.process.config(), sort_keys=True)

    def timestep(self, t: Tensor) -> Tensor:
        """float64: the network's time input at process time ``t``."""
        if isinstance(self.process, VPDiscrete):
            return self.process.timestep(t)
        if self.kind == "edm":
            return f64(t).log() / 4 if self.label == "log" else f64(t).atan() * (2 / math.pi)
        return (1 - f64(t) if self.sign < 0 else f64(t)) * self.levels

    def time(self, timestep: Tensor) -> Tensor:
        """Inverse of ``timestep``."""
        timestep = f64(timestep)
        if isinstance(self.process, VPDiscrete):
            return (timestep + 1) / self.process.levels
        if self.kind == "edm":
            logarithmic = self.label == "log"
            return (4 * timestep).exp() if logarithmic else (timestep * (math.pi / 2)).tan()
        time = timestep / self.levels
        return 1 - time if self.sign < 0 else time

    def preconditioning(self, t: Tensor, prediction: Literal["data", "noise"]) -> Preconditioning:
        """c_skip, c_out, c_in at process times ``t``; ``c_noise`` is not meant to be used."""
        made = self.denoiser.preconditioning(t, prediction)
        return made if self.sign > 0 else made._replace(c_out=-made.c_out)

    def check(self, process: Process) -> None:
        """Raises ValueError unless ``process`` is this model's."""
        same = type(process) is type(self.process)
        if same and isinstance(process, VPDiscrete):
            mine = cast(VPDiscrete, self.process)
            t = torch.linspace(0, 1, 65, dtype=torch.float64)
            own, other = (p.log_alpha(t).clamp(min=_NOISE) for p in (mine, process))
            same = process.levels == mine.levels and torch.allclose(
                other, own, rtol=1e-4, atol=1e-7
            )
        elif same and self.kind == "edm":
            same = process.t_max <= self.process.t_max * (1 + 1e-9)
        if not same:
            raise ValueError(
                f"the solver was made for {process!r}, this scheduler's config describes "
                f"{self.process!r}: make or distil the solver for this pipeline"
            )


def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("a scheduler does not call the network")

"""The DLMS designer network (Liang et al., ICLR 2025, section 3.2): features and time -> one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import linear
from ..ops.designer_row import kernel_constants
from ..processes import Process
from ..support.values import whole_number
from ..support.versioned import Versioned

_MADE: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
TimeCoordinate = Literal["log", "linear"]


@dataclass(frozen=True)
class DesignerSettings:
    """Shape and bounds of a designer.

    Attributes:
        steps: N solver steps; N = nfe + 1 with ``afs``, else nfe.
        order: p, the most outputs a step combines.
        afs: the first output is the analytic zero data prediction, without an evaluation.
        prediction: what a step combines and the ring stores.
        features: length of the bottleneck feature vector; 0 turns the input off.
        time_range: R, bound of the learned offset of the logit of the step fraction; 0 freezes times.
        scale_range: rho, the network is called at s * t with s in 1 +- rho; 0 freezes s = 1.
        coordinate: steps are fractions of what remains of log t or of t.
        time_gain: factor of the head's outputs for times and scalings: as Adam moves every output
            at one rate, less than 1 lets the times move slower than the weights.
    """

    steps: int
    order: int
    afs: bool = True
    prediction: Literal["data", "noise"] = "data"
    features: int = 64
    time_range: float = 0.7
    scale_range: float = 0.2
    coordinate: TimeCoordinate = "log"
    time_gain: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("order", 1), ("features", 0)):
            whole_number(getattr(self, name), name, least)
        for name, known in (("prediction", ("data", "noise")), ("coordinate", ("log", "linear"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {known}")

    @property
    def nfe(self) -> int:
        return self.steps - int(self.afs)


class Design(NamedTuple):
    """What the designer says of step n (1-based): float64, per sample."""

    weights: Tensor  # [B, min(n, p)], newest output first, sum 1
    time: Tensor  # [B] t_n
    network_time: Tensor  # [B] s_n * t_n, clamped to the model's range


class Designer(Versioned, nn.Module):
    """(features, t_{n-1}, n-1) -> weights a^(n), next time t_n and its time scaling s_n.

    About 9k parameters: 64 -> 128 -> 4 features, 8 time and 8 index channels, one linear head
    whose weight starts at zero and a bias per step, so that the untrained designer *is* the
    handcrafted solver it is initialised with, whatever the features.

    Args:
        settings: sizes and bounds.
        process: the diffusion process.
        grid: float64 ``[steps + 1]`` the initial times; both ends stay fixed.
        weights: float64 ``[steps, order]`` initial weights, row n-1 for step n, newest first, zero
            beyond min(n, order), rows summing to 1.
    """

    grid: Tensor
    init_weights: Tensor
    init_logits: Tensor
    constants: Tensor

    def __init__(
        self, settings: DesignerSettings, process: Process, grid: Tensor, weights: Tensor
    ) -> None:
        super().__init__()
        n, p = settings.steps, settings.order
        if grid.shape != (n + 1,) or weights.shape != (n, p):
            raise ValueError(
                f"grid {tuple(grid.shape)} and weights {tuple(weights.shape)}, expected "
                f"{(n + 1,)} and {(n, p)} for {n} steps of order {p}"
            )
        if not bool((grid.diff() < 0).all()):
            raise ValueError(f"grid is {grid.tolist()}, expected falling times")
        if settings.coordinate == "log" and not float(grid[-1]) > 0:
            raise ValueError(
                f"the grid ends at {float(grid[-1])}, whose logarithm is not finite: use "
                "coordinate='linear', or a grid that ends above 0"
            )
        self.settings = settings
        self.process = process
        self.t_start = float(grid[0])  # a copy for the host: the grid itself may lie on a GPU
        self.register_buffer("grid", grid.detach().to(torch.float64).clone())
        self.register_buffer("init_weights", weights.detach().to(torch.float64).clone())
        self.register_buffer("init_logits", self._remaining_logits(self.grid))
        bounds = (settings.time_range, settings.scale_range, settings.time_gain)
        constants = kernel_constants(bounds, process.config())
        self.register_buffer("constants", constants, persistent=False)
        if settings.features:
            self.encoder = nn.Sequential(
                nn.Linear(settings.features, 128, **_MADE), nn.SiLU(), nn.Linear(128, 4, **_MADE)
            )
        self.time = nn.Sequential(nn.Linear(8, 8, **_MADE), nn.SiLU())
        self.index = nn.Embedding(n, 8, **_MADE)
        self.head = nn.Linear(20, p + 2, bias=False, **_MADE)
        self.bias = nn.Parameter(torch.zeros(n, p + 2, dtype=torch.float32, device="cpu"))
        nn.init.zeros_(self.head.weight)

    def _to_coordinate(self, t: Tensor) -> Tensor:
        return t.log() if self.settings.coordinate == "log" else t

    def _from_coordinate(self, u: Tensor) -> Tensor:
        return u.exp() if self.settings.coordinate == "log" else u

    def _remaining_logits(self, grid: Tensor) -> Tensor:
        """Logit of step n's fraction of what remains; the last entry (fraction 1) is unused."""
        u = self._to_coordinate(grid)
        fraction = (u[:-1] - u[1:]) / (u[:-1] - u[-1])
        return torch.logit(fraction[:-1].clamp(1e-9, 1 - 1e-9))

    def forward(self, features: Tensor | None, t: Tensor, n: int) -> Design:
        """Design of step ``n`` (1..N) from ``features`` ``[B, F]`` and ``t`` = t_{n-1} ``[B]``."""
        raw = self._head(features, t, n).to(torch.float64)
        order = min(n, self.settings.order)
        z = raw[:, :order]
        weights = self.init_weights[n - 1, :order] + (z - z.mean(dim=1, keepdim=True))
        if n == self.settings.steps:
            end = self.grid[-1].expand(t.shape[0])
            return Design(weights, end, end)
        gain = self.settings.time_gain
        time = self._next_time(gain * raw[:, -2], t, n)
        scale = 1 + self.settings.scale_range * torch.tanh(gain * raw[:, -1])
        network_time = torch.clamp(scale * time, min=self.grid[-1], max=self.grid[0])
        return Design(weights, time, network_time)

    def _next_time(self, raw: Tensor, t: Tensor, n: int) -> Tensor:
        bound = self.settings.time_range
        if bound == 0:
            return self.grid[n].expand(t.shape[0])
        fraction = linear.sigmoid(self.init_logits[n - 1] + bound * torch.tanh(raw / bound))
        start, end = self._to_coordinate(t), self._to_coordinate(self.grid[-1])
        return self._from_coordinate(start + fraction * (end - start))

    def _head(self, features: Tensor | None, t: Tensor, n: int) -> Tensor:
        batch = t.shape[0]
        dtype = self.bias.dtype
        if self.settings.features and features is not None:
            if features.shape[1:] != (self.settings.features,):
                raise ValueError(
                    f"features are {tuple(features.shape)}, expected [B, {self.settings.features}]: the "
                    "bottleneck has another size at this resolution; sample at the one the solver was "
                    "distilled for, or run solver.table(denoiser, noise)"
                )
            encoded = _two_layers(self.encoder, features.to(dtype))
        else:
            encoded = self.bias.new_zeros(batch, 4)
        embedded = linear.swish(linear.linear(_layer(self.time, 0), positional(t).to(dtype)))
        index = self.index.weight[n - 1].expand(batch, 8)
        joined = torch.cat([encoded, embedded, index], dim=1)
        return linear.linear(self.head, joined) + self.bias[n - 1]


def _layer(layers: nn.Sequential, index: int) -> nn.Linear:
    layer = layers[index]
    assert isinstance(layer, nn.Linear)
    return layer


def _two_layers(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, SiLU, linear."""
    return linear.linear(_layer(layers, 2), linear.swish(linear.linear(_layer(layers, 0), x)))


def positional(t: Tensor, channels: int = 8, longest: float = 1e4) -> Tensor:
    """``[B]`` times -> ``[B, channels]`` sines and cosines of t at geometric frequencies."""
    half = channels // 2
    rates = torch.arange(half, dtype=torch.float64, device=t.device) / (half - 1)
    angles = t.to(torch.float64)[:, None] * longest**-rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)

"""The DLMS designer network and the policy it drives (Liang et al., ICLR 2025, section 3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import linear
from ..ops.designer_row import kernel_constants
from ..processes import Process, from_config
from ..solvers.file import register_policy
from ..solvers.run import Row
from ..support.transfer import to_host
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


def step_coefficients(
    process: Process, prediction: str, t: Tensor, t_next: Tensor
) -> tuple[Tensor, Tensor]:
    """(A, C) of x_next = A x + C D: the exponential integrator for constant D (DLMS Eq. 9)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    alpha_next, sigma_next = process.alpha(t_next), process.sigma(t_next)
    if prediction == "data":
        a = sigma_next / sigma
        return a, alpha_next - alpha * a
    a = alpha_next / alpha
    return a, sigma_next - sigma * a


class DesignerPolicy:
    """A designer as a policy for the sampler (DLMS Algorithm 2)."""

    kind: ClassVar[str] = "designer"

    def __init__(self, designer: Designer) -> None:
        self.designer = designer
        self.process = designer.process
        self.prediction: Literal["data", "noise"] = designer.settings.prediction

    @property
    def nfe(self) -> int:
        return self.designer.settings.nfe

    @property
    def depth(self) -> int:
        return min(self.designer.settings.order, self.nfe)

    @property
    def t_start(self) -> float:
        return self.designer.t_start

    @property
    def grid(self) -> Tensor:
        """The times the designer started from."""
        return self.designer.grid

    @property
    def needs_features(self) -> bool:
        return self.designer.settings.features > 0

    def decide(self, features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> Design:
        """The design of step ``n`` (1-based) that starts at the time ``at[0]`` ``[B]``."""
        design: Design = self.designer(features, at[0], n)
        return design

    def place(self, device: torch.device) -> None:
        """Moves the designer to ``device`` if it lies elsewhere.

        RuntimeError: inside ``torch.compile``, which cannot.
        """
        if self.designer.grid.device == device:
            return
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                f"the designer is on {self.designer.grid.device}, the state on {device}: move the "
                "sampler there before it is compiled"
            )
        self.designer.to(device)

    def start(self, batch: int, device: torch.device) -> DesignerRun:
        self.place(device)
        return self.run(batch, device)

    def run(self, batch: int, device: torch.device) -> DesignerRun:
        """As ``start``, without moving the designer."""
        return DesignerRun(self, batch, device)

    # -- as a table, for people and for files ---------------------------------------------------

    def static_table(self) -> None:
        """None: a designer computes its rows while sampling."""

    def mean(self, decision: Design) -> Design:
        """Weights arithmetically, times geometrically; ``[1, ...]``."""
        time, network_time = (_geometric(t) for t in (decision.time, decision.network_time))
        return Design(decision.weights.mean(0, keepdim=True), time, network_time)

    def static_grid(self, decisions: dict[int, Design]) -> Tensor:
        """The designed times between the fixed ends."""
        inner = [decisions[n].time for n in range(1, self.designer.settings.steps)]
        ends = self.designer.grid
        return to_host(torch.cat([ends[:1], *inner, ends[-1:]]))

    def static_options(self) -> dict[str, Any]:
        settings = self.designer.settings
        return {"method": "dlms-static", "order": settings.order, "afs": settings.afs}

    def describe(self) -> dict[str, Any]:
        """Its size and where it starts from: the rows depend on the sample."""
        designer = self.designer
        return {
            "kind": self.kind,
            "name": "dlms",
            "parameters": sum(p.numel() for p in designer.parameters()),
            "initial_grid": designer.grid.tolist(),
            "initial_weights": designer.init_weights.tolist(),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.designer.state_dict().items()}
        settings = asdict(self.designer.settings)
        return tensors, {"designer": settings, "process": self.process.config()}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> DesignerPolicy:
        """Inverse of ``state``; raises ValueError on anything that does not fit."""
        shape = DesignerSettings(**settings["designer"])
        process = from_config(settings["process"])
        grid, weights = tensors["grid"], tensors["init_weights"]
        designer = Designer(shape, process, grid, weights)
        designer.load_state_dict(tensors)
        return cls(designer)


class DesignerRun:
    """One run: per-sample times and, with AFS in noise form, the trace of the start state."""

    def __init__(self, policy: DesignerPolicy, batch: int, device: torch.device) -> None:
        self._policy = policy
        settings = self._settings = policy.designer.settings
        self._t = policy.designer.grid[0].to(device).expand(batch)
        self._process = policy.process
        self.initial_scale = torch.ones((), dtype=torch.float64, device=device)
        self.time = self._t
        self._eliminate = settings.afs and settings.prediction == "noise"
        self._sigma_start = self._process.sigma(self._t)
        if settings.afs:
            design = policy.decide(None, 1, (self._t,))
            sigma = self._process.sigma(design.time)
            self.initial_scale = sigma / self._sigma_start
            self._t, self.time = design.time, design.network_time
        # x_n = start_weight * noise + sum_j past[:, j] * m_j, newest first
        self._start_weight = self.initial_scale.expand(batch)
        self._past = self._t.new_zeros(batch, 0)

    def row(self, n: int, features: Tensor | None) -> Row:
        """Row of evaluation ``n`` (0-based)."""
        settings = self._settings
        step = n + 1 + int(settings.afs)
        design = self._policy.decide(features, step, (self._t,))
        a, c = step_coefficients(self._process, settings.prediction, self._t, design.time)
        weights = design.weights[:, : n + 1]
        b = c[:, None] * weights
        if self._eliminate:
            a, b = self._fold_start(a, b, c, design.weights, n)
        depth = self._policy.depth
        if b.shape[1] < depth:
            b = torch.nn.functional.pad(b, (0, depth - b.shape[1]))
        self._t = design.time
        last = step == settings.steps
        return Row(a, b[:, :depth], None if last else design.network_time)

    def _fold_start(
        self, a: Tensor, b: Tensor, c: Tensor, weights: Tensor, n: int
    ) -> tuple[Tensor, Tensor]:
        """The AFS output is noise / sigma_0: written through x_n, which holds the noise too."""
        past = torch.nn.functional.pad(self._past, (1, 0))  # the newest output is not in x_n yet
        start = a * self._start_weight
        if weights.shape[1] > n + 1:
            pseudo = c * weights[:, n + 1] / self._sigma_start  # weight of the noise itself
            through = pseudo / self._start_weight
            a = a + through
            b = b - through[:, None] * past[:, : b.shape[1]]
            start = start + pseudo
        grown = a[:, None] * past
        width = b.shape[1]
        self._past = torch.cat([grown[:, :width] + b, grown[:, width:]], dim=1)
        self._start_weight = start
        return a, b


def _geometric(t: Tensor) -> Tensor:
    return t.clamp_min(1e-300).log().mean().exp().reshape(1)


def parameter_count(module: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)


register_policy(DesignerPolicy)

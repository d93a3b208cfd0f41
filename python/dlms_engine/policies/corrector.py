"""A small residual after the last row: what no coefficients can reach.

    x = y + g R([y, m_{N-1}, m_{N-2} .. ])        R's last layer is zero before training

Any table's end is a linear combination of the start and the network's outputs, the same for every
pixel; the error that is left after a good table is not. R is three convolutions over the last state
and outputs the ring holds anyway: no network evaluation more.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..processes import Process, from_config
from ..solvers.file import register_policy
from ..solvers.policy import PolicyRun
from ..solvers.table import SolverTable

Layout = Literal["image", "sequence", "vector"]
LAYOUTS = ("image", "sequence", "vector")


@dataclass(frozen=True)
class CorrectorSettings:
    """Shape of a corrector.

    Attributes:
        layout: ``"image"`` ``[C, H, W]`` (3x3 convolutions), ``"sequence"`` ``[T, C]`` (convolutions
            of width 3 along T) or ``"vector"`` ``[C]`` (linear layers).
        channels: C.
        outputs: how many of the newest outputs it reads.
        width: hidden channels.
        layers: convolutions, at least 2.
    """

    layout: Layout
    channels: int
    outputs: int
    width: int = 32
    layers: int = 3

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, expected one of {LAYOUTS}")
        for name, least in (("channels", 1), ("outputs", 1), ("width", 1), ("layers", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")


def layout_of(shape: tuple[int, ...]) -> Layout | None:
    """The layout of samples of ``shape``; None where there is none (video and more)."""
    return {3: "image", 2: "sequence", 1: "vector"}.get(len(shape))  # type: ignore[return-value]


class Corrector(nn.Module):
    """R of the module's first lines, float32.

    Its inputs are the state, the newest output and the differences of successive outputs, each
    divided by its own standard deviation; its output is multiplied by that of the error it learns.

    Attributes:
        scales: float32 ``[1 + outputs]``, standard deviations of the inputs.
        gain: float32 ``[]``, g.
    """

    scales: Tensor
    gain: Tensor

    def __init__(self, settings: CorrectorSettings) -> None:
        super().__init__()
        self.settings = settings
        inputs = settings.channels * (1 + settings.outputs)
        widths = [inputs, *[settings.width] * (settings.layers - 1), settings.channels]
        kinds: dict[str, Any] = {
            "image": lambda a, b: nn.Conv2d(a, b, 3, padding=1),
            "sequence": lambda a, b: nn.Conv1d(a, b, 3, padding=1),
            "vector": nn.Linear,
        }
        make = kinds[settings.layout]
        self.layers = nn.ModuleList(make(a, b) for a, b in itertools.pairwise(widths))
        last = self.layers[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.register_buffer("scales", torch.ones(1 + settings.outputs))
        self.register_buffer("gain", torch.ones(()))

    def inputs(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The scaled inputs, channels first: ``[B, C * (1 + outputs), ...]``."""
        newest = outputs[: self.settings.outputs]
        parts = [x, newest[0], *(a - b for a, b in itertools.pairwise(newest))]
        scaled = [part / self.scales[i].to(part.dtype) for i, part in enumerate(parts)]
        if self.settings.layout == "sequence":
            scaled = [part.transpose(1, 2) for part in scaled]
        return torch.cat(scaled, dim=1)

    def residual(self, inputs: Tensor) -> Tensor:
        """``g R`` like the state, from ``inputs``."""
        h = inputs.to(self.gain.dtype)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        h = cast(Tensor, self.layers[-1](h)) * self.gain
        return h.transpose(1, 2) if self.settings.layout == "sequence" else h

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """``x`` ``[B, ...]`` after the last row, ``outputs`` newest first -> the corrected state."""
        return x + self.residual(self.inputs(x, outputs)).to(x.dtype)


class CorrectedPolicy:
    """A table and the corrector that follows its last row.

    Args:
        rows: the table.
        corrector: reads at most ``rows.depth`` outputs.
    """

    kind: ClassVar[str] = "corrected"

    def __init__(self, rows: SolverTable, corrector: Corrector) -> None:
        if corrector.settings.outputs > rows.depth:
            raise ValueError(
                f"the corrector reads {corrector.settings.outputs} outputs, the rows keep "
                f"{rows.depth}"
            )
        self.rows = rows
        self.corrector = corrector.eval().requires_grad_(False)
        self.process: Process = rows.process
        self.prediction = rows.prediction

    @property
    def nfe(self) -> int:
        return int(self.rows.nfe)

    @property
    def depth(self) -> int:
        return int(self.rows.depth)

    @property
    def t_start(self) -> Tensor | float:
        return self.rows.t_start

    @property
    def grid(self) -> Tensor:
        return self.rows.grid

    @property
    def needs_features(self) -> bool:
        """The rows do not; the corrector reads states and outputs."""
        return False

    def static_table(self) -> None:
        """None: the table alone, without its corrector, is another solver."""

    def start(self, batch: int, device: torch.device) -> PolicyRun:
        """A run of the rows alone; the sampler applies the corrector after the last."""
        return self.rows.start(batch, device)

    def describe(self) -> dict[str, Any]:
        """The table's description and the corrector's size."""
        rows = self.rows.describe()
        return {
            **rows,
            "kind": self.kind,
            "corrector": asdict(self.corrector.settings),
            "parameters": sum(p.numel() for p in self.corrector.parameters()),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        tensors = {
            f"corrector.{k}": v.detach().cpu().double().contiguous()
            for k, v in self.corrector.state_dict().items()
        }
        tensors |= {f"rows.{k}": v.cpu().contiguous() for k, v in self.rows.to_dict().items()}
        settings = {
            "corrector": asdict(self.corrector.settings),
            "rows": self.rows.settings(),
            "process": self.process.config(),
        }
        return tensors, settings

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> CorrectedPolicy:
        """Inverse of ``state``; raises ValueError on anything that does not fit."""
        process = from_config(settings["process"])
        rows = SolverTable.from_dict(process, _part(tensors, "rows."), settings["rows"])
        return cls(rows, read_corrector(_part(tensors, "corrector."), settings["corrector"]))


def read_corrector(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Corrector:
    """A corrector from untrusted numbers.

    Raises:
        ValueError: settings or shapes that do not fit, numbers that are not finite.
    """
    shape = CorrectorSettings(**settings)
    numbers = sum(math.prod(v.shape) for v in tensors.values())
    widest = shape.width * max(shape.width, shape.channels * (1 + shape.outputs))
    if widest > 9 * max(numbers, 1) or shape.layers > 16:
        raise ValueError(f"corrector of {shape} does not fit {numbers} numbers")
    corrector = Corrector(shape)
    if not all(bool(v.isfinite().all()) for v in tensors.values()):
        raise ValueError("corrector: numbers that are not finite")
    try:
        corrector.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"corrector: {error}") from error
    if not bool((corrector.scales > 0).all()):
        raise ValueError(f"corrector: scales are {corrector.scales.tolist()}, expected positive")
    return corrector


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


register_policy(CorrectedPolicy)

"""A small residual after the last row, or after several: what no coefficients can reach.

    x_{n+1} = y_n + g R_n([y_n, m_n, m_{n-1} .. ])        R's last layer is zero before training

Any table's states are linear combinations of the start and the network's outputs, the same for every
pixel; the error that is left after a good table is not. R is three convolutions over the state and
outputs the ring holds anyway: no network evaluation more. After a row before the last, the next
evaluation is made at the better state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..processes import Process, from_config
from ..solvers.file import register_policy
from ..solvers.policy import PolicyRun
from ..solvers.table import SolverTable
from ..support.wide import at_least_single

Layout = Literal["image", "sequence", "vector"]
LAYOUTS = ("image", "sequence", "vector")

_MADE: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


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
            "image": lambda a, b: nn.Conv2d(a, b, 3, padding=1, **_MADE),
            "sequence": lambda a, b: nn.Conv1d(a, b, 3, padding=1, **_MADE),
            "vector": lambda a, b: nn.Linear(a, b, **_MADE),
        }
        make = kinds[settings.layout]
        self.layers = nn.ModuleList(make(a, b) for a, b in itertools.pairwise(widths))
        last = self.layers[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.register_buffer(
            "scales", torch.ones(1 + settings.outputs, dtype=torch.float32, device="cpu")
        )
        self.register_buffer("gain", torch.ones((), dtype=torch.float32, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Corrector:
        """A sampler that is cast to half precision with its network keeps its correctors."""
        super()._apply(at_least_single(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def inputs(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """The scaled inputs, channels first: ``[B, C * (1 + outputs), ...]``.

        ValueError: ``x`` is of another layout, or has other channels.
        """
        self._check(x)
        newest = outputs[: self.settings.outputs]
        parts = [x, newest[0], *(a - b for a, b in itertools.pairwise(newest))]
        scaled = [part / self.scales[i].to(part.dtype) for i, part in enumerate(parts)]
        if self.settings.layout == "sequence":
            scaled = [part.transpose(1, 2) for part in scaled]
        return torch.cat(scaled, dim=1)

    def _check(self, x: Tensor) -> None:
        layout, channels = self.settings.layout, self.settings.channels
        axis = 2 if layout == "sequence" else 1
        if layout_of(tuple(x.shape[1:])) != layout or x.shape[axis] != channels:
            raise ValueError(
                f"samples are {list(x.shape)}, but the solver's corrector was trained on {layout}s of "
                f"{channels} channels: sample what it was distilled for"
            )

    def residual(self, inputs: Tensor) -> Tensor:
        """``g R`` like the state, from ``inputs``; under autocast, too, in the weights' dtype."""
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._residual(inputs)
        return self._residual(inputs)

    def _residual(self, inputs: Tensor) -> Tensor:
        h = inputs.to(self.gain.dtype)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        h = cast(Tensor, self.layers[-1](h)) * self.gain
        return h.transpose(1, 2) if self.settings.layout == "sequence" else h

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """``x`` ``[B, ...]`` after the last row, ``outputs`` newest first -> the corrected state."""
        return x + self.residual(self.inputs(x, outputs)).to(x.dtype)


class Correctors(nn.Module):
    """One corrector after each of the last rows; ``parts[-1]`` follows the last.

    Attributes:
        first: the row that ``parts[0]`` follows.
    """

    def __init__(self, parts: Sequence[Corrector], nfe: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.first = nfe - len(parts)

    def forward(self, n: int, x: Tensor, outputs: list[Tensor]) -> Tensor:
        """``x`` ``[B, ...]`` after row ``n``, ``outputs`` newest first -> the corrected state."""
        if n < self.first:
            return x
        corrected: Tensor = self.parts[n - self.first](x, outputs)
        return corrected


class CorrectedPolicy:
    """A table and what follows its rows.

    Args:
        rows: the table.
        correctors: one after the last row, or several for as many last rows, in order; one after
            row n reads at most ``min(n + 1, rows.depth)`` outputs.

    Attributes:
        correctors: a module, called with the row's number, the state and the outputs.
    """

    kind: ClassVar[str] = "corrected"

    def __init__(self, rows: SolverTable, correctors: Corrector | Sequence[Corrector]) -> None:
        parts = [correctors] if isinstance(correctors, Corrector) else list(correctors)
        if not 1 <= len(parts) <= rows.nfe:
            raise ValueError(f"{len(parts)} correctors, expected 1 to {rows.nfe}: one a row")
        for n, part in enumerate(parts, rows.nfe - len(parts)):
            if part.settings.outputs > min(n + 1, rows.depth):
                raise ValueError(
                    f"the corrector of row {n} reads {part.settings.outputs} outputs, the rows keep "
                    f"{min(n + 1, rows.depth)}"
                )
        self.rows = rows
        self.correctors = Correctors(parts, rows.nfe).eval().requires_grad_(False)
        self.process: Process = rows.process
        self.prediction = rows.prediction

    @property
    def parts(self) -> list[Corrector]:
        """The correctors, the last row's last."""
        return [cast(Corrector, part) for part in self.correctors.parts]

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
        """The rows do not; correctors read states and outputs."""
        return False

    def static_table(self) -> None:
        """None: the table alone, without its corrector, is another solver."""

    def start(self, batch: int, device: torch.device) -> PolicyRun:
        """A run of the rows alone; the sampler applies the correctors."""
        return self.rows.start(batch, device)

    def describe(self) -> dict[str, Any]:
        """The table's description and the correctors' sizes."""
        rows = self.rows.describe()
        return {
            **rows,
            "kind": self.kind,
            "corrector": asdict(self.parts[-1].settings),
            "correctors": len(self.parts),
            "parameters": sum(p.numel() for p in self.correctors.parameters()),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        tensors = {f"rows.{k}": v.cpu().contiguous() for k, v in self.rows.to_dict().items()}
        settings: dict[str, Any] = {
            "rows": self.rows.settings(),
            "process": self.process.config(),
        }
        for name, part in zip(_names(len(self.parts)), self.parts, strict=True):
            settings[name] = asdict(part.settings)
            for key, value in part.state_dict().items():
                tensors[f"{name}.{key}"] = value.detach().cpu().double().contiguous()
        return tensors, settings

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> CorrectedPolicy:
        """Inverse of ``state``; raises ValueError on anything that does not fit."""
        process = from_config(settings["process"])
        rows = SolverTable.from_dict(process, _part(tensors, "rows."), settings["rows"])
        count = sum(key.startswith("corrector") for key in settings)
        parts = [
            read_corrector(_part(tensors, f"{name}."), settings[name]) for name in _names(count)
        ]
        return cls(rows, parts)


def _names(count: int) -> list[str]:
    """Of the correctors in a file, first row first: the last row's is ``corrector`` alone."""
    return [f"corrector{i}" for i in range(count - 1, 0, -1)] + ["corrector"]


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

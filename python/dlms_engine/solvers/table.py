"""``SolverTable``: a sampler as numbers, one row per network evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..processes import Process
from ..support.versioned import Versioned
from .run import TableRun

Prediction = Literal["data", "noise"]
TENSORS = ("a", "b", "times", "initial_scale", "grid")


@dataclass(frozen=True, eq=False, repr=False)
class SolverTable(Versioned):
    """x_{n+1} = a[n] x_n + sum_k b[n, k] m_{n-k}, all float64.

    Attributes:
        process: the noise process the table was made for.
        a: ``[*batch, rows]``.
        b: ``[*batch, rows, depth]``; ``b[..., n, k]`` weighs m_{n-k}, 0 where n - k < 0.
        times: ``[*batch, rows]``, the time the network is called with at every evaluation.
        t_start: ``[*batch]``, time of the state the sampler is given.
        t_end: ``[*batch]``, time of the state it returns.
        initial_scale: ``[*batch]``; x_0 = initial_scale * given state (not 1 with an analytical
            first step).
        prediction: what m is, ``"data"`` or ``"noise"``.
        name: the method.
        options: JSON-able settings the table was made with.
        grid: ``[*batch, steps + 1]``, the solver's own times.
    """

    process: Process
    a: Tensor
    b: Tensor
    times: Tensor
    t_start: Tensor
    t_end: Tensor
    initial_scale: Tensor
    prediction: Prediction
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))

    @property
    def nfe(self) -> int:
        """Network evaluations of one run (a guided network's doubled batch counts once)."""
        return int(self.a.shape[-1])

    @property
    def depth(self) -> int:
        """How many of the newest outputs a row may read."""
        return int(self.b.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape in front of the rows; ``()`` for one table shared by all samples."""
        return tuple(self.a.shape[:-1])

    # -- policy protocol ------------------------------------------------------------------------

    @property
    def needs_features(self) -> bool:
        """A table's rows are the same for every sample."""
        return False

    def start(self, batch: int, device: torch.device) -> TableRun:
        """A run on ``device``; the batch is the table's own or any.

        ValueError: the table has rows for another number of samples.
        """
        self.require_batch(batch)
        moved = (v.to(device) for v in (self.a, self.b, self.times, self.initial_scale))
        return TableRun(*moved)

    def require_batch(self, batch: int) -> None:
        """ValueError unless the rows are one table for all, or one for each of ``batch`` samples."""
        if self.batch_shape and self.batch_shape != (batch,):
            raise ValueError(
                f"table {self.name!r} has rows for each of {list(self.batch_shape)} samples, and the "
                f"batch is {batch}"
            )

    def static_table(self) -> SolverTable:
        """Itself."""
        return self

    def describe(self) -> dict[str, Any]:
        """Name, options, grid and every row."""
        parts = (self.times.tolist(), self.a.tolist(), self.b.tolist())
        return {
            "kind": "table",
            "name": self.name,
            "options": dict(self.options),
            "grid": self.grid.tolist(),
            "initial_scale": self.initial_scale.tolist(),
            "rows": [{"time": t, "a": a, "b": b} for t, a, b in zip(*parts, strict=True)],
        }

    # -- promises -------------------------------------------------------------------------------

    def validate(self) -> None:
        """Checks every promise above.

        Raises:
            ValueError: naming the field, what it is and what was expected.
        """
        if self.prediction not in ("data", "noise"):
            raise ValueError(
                f"table {self.name!r}: prediction is {self.prediction!r}, "
                "expected 'data' or 'noise'"
            )
        if self.a.ndim < 1 or self.nfe < 1 or self.b.ndim < 1 or self.depth < 1:
            raise ValueError(
                f"table {self.name!r}: a is {tuple(self.a.shape)}, b is {tuple(self.b.shape)}, "
                "expected [*batch, rows] and [*batch, rows, depth], rows and depth >= 1"
            )
        batch, rows = self.batch_shape, self.nfe
        steps = int(self.grid.shape[-1]) if self.grid.ndim else 0
        if self.depth > rows or steps < 2:
            raise ValueError(
                f"table {self.name!r}: depth is {self.depth} and the grid has {steps} times, "
                f"expected at most {rows} and at least 2"
            )
        shapes = {
            "a": (*batch, rows),
            "b": (*batch, rows, self.depth),
            "times": (*batch, rows),
            "t_start": batch,
            "t_end": batch,
            "initial_scale": batch,
            "grid": (*batch, steps),
        }
        for key, shape in shapes.items():
            self._check_tensor(key, shape)
        self._check_values()
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise ValueError(
                f"table {self.name!r}: options are {self.options!r}, expected JSON values: {exc}"
            ) from exc

    def _check_tensor(self, key: str, shape: tuple[int, ...]) -> None:
        value = getattr(self, key)
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"table {self.name!r}: {key} is {kind}, expected torch.float64")
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"table {self.name!r}: {key} has shape {tuple(value.shape)}, expected {shape}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"table {self.name!r}: {key} is {value.detach().tolist()}, expected finite numbers"
            )

    def _check_values(self) -> None:
        grid = self.grid.detach()
        if not bool((grid.diff(dim=-1) < 0).all()):
            raise ValueError(
                f"table {self.name!r}: grid is {grid.tolist()}, expected strictly decreasing times"
            )
        ends = torch.equal(self.t_start, self.grid[..., 0]) and torch.equal(
            self.t_end, self.grid[..., -1]
        )
        if not ends:
            raise ValueError(f"table {self.name!r}: t_start and t_end are not the ends of grid")
        if bool((self.times < 0).any()):
            raise ValueError(
                f"table {self.name!r}: times are {self.times.detach().tolist()}, expected >= 0"
            )
        rows = torch.arange(self.nfe, device=self.b.device)
        missing = torch.arange(self.depth, device=self.b.device) > rows[:, None]
        if bool((self.b.detach()[..., missing] != 0).any()):
            raise ValueError(
                f"table {self.name!r}: b weighs outputs from before the first evaluation"
            )

    def detach(self) -> SolverTable:
        """The same table without autograd history."""
        return self._map(lambda value: value.detach())

    def to(self, device: torch.device | str) -> SolverTable:
        """The same table with its tensors on ``device``."""
        return self._map(lambda value: value.to(device))

    def _map(self, change: Any) -> SolverTable:
        names = (*TENSORS, "t_start", "t_end")
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors that, with ``settings()`` and the process, define the table."""
        return {name: getattr(self, name).detach() for name in TENSORS}

    def settings(self) -> dict[str, Any]:
        """The JSON-able rest: name, prediction, nfe and options."""
        return {
            "name": self.name,
            "prediction": self.prediction,
            "nfe": self.nfe,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(
        cls, process: Process, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> SolverTable:
        """Rebuilds and validates a table from ``to_dict()`` and ``settings()``.

        Raises:
            ValueError: missing or unknown names, or values that break the table's promises.
        """
        if set(tensors) != set(TENSORS):
            raise ValueError(f"tensors are {sorted(tensors)}, expected {sorted(TENSORS)}")
        expected = {"name", "prediction", "nfe", "options"}
        if set(settings) != expected:
            raise ValueError(f"settings are {sorted(settings)}, expected {sorted(expected)}")
        if not isinstance(settings["name"], str) or not isinstance(settings["options"], dict):
            raise ValueError("settings: expected a string name and an object of options")
        grid = tensors["grid"]
        if grid.ndim < 1 or grid.shape[-1] < 2:
            raise ValueError(f"grid has shape {tuple(grid.shape)}, expected [*batch, steps + 1]")
        table = cls(
            process=process,
            **{name: tensors[name] for name in TENSORS},
            t_start=grid[..., 0],
            t_end=grid[..., -1],
            prediction=settings["prediction"],
            name=settings["name"],
            options=dict(settings["options"]),
        )
        table.validate()
        if settings["nfe"] != table.nfe:
            raise ValueError(f"nfe is {settings['nfe']!r}, but the table has {table.nfe} rows")
        return table

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        if self.batch_shape:
            times = f"{list(self.batch_shape)} grids of {self.nfe} times"
        else:
            times = "[" + ", ".join(f"{t:.6g}" for t in self.times.detach().tolist()) + "]"
        return (
            f"SolverTable({self.name}{options}; nfe={self.nfe}, depth={self.depth}, "
            f"prediction={self.prediction}, process={self.process.name}, times={times})"
        )

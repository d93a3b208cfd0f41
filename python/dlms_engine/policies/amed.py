"""AMED-Solver and AMED-Plugin as a policy: two rows a step, computed per sample while sampling."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..processes import Process, RectifiedFlow, from_config
from ..solvers.file import register_policy
from ..solvers.run import Row
from ..solvers.trace import START, Form, OnlineTrace
from .amed_formulas import AmedBase, Walk, check_levels, level_range
from .amed_predictor import AmedPredictor, Choice


class AmedPolicy:
    """A predictor that drives ``base`` over ``grid`` (Zhou et al. 2024, Algorithm 2).

    Args:
        predictor: sees the bottleneck after the first evaluation of every step; with AFS the first
            step sees zeros.
        grid: float64 ``[steps + 1]``; 2 * steps evaluations, one less with AFS.

    Raises:
        ValueError: the grid's ends have no geometric mean (see ``check_levels``).
    """

    kind: ClassVar[str] = "amed"

    def __init__(
        self, predictor: AmedPredictor, base: AmedBase, process: Process, grid: Tensor
    ) -> None:
        grid = grid.detach().to(torch.float64)
        if grid.ndim != 1 or len(grid) < 2 or not bool((grid.diff() < 0).all()):
            raise ValueError(f"grid is {grid.tolist()}, expected at least two falling times")
        self.predictor = predictor
        self.base = base
        self.process = process
        self.grid = grid
        self.prediction: Literal["data", "noise"] = base.stored(process)
        check_levels(base, process, grid)
        self._asked = level_range(process)
        self._grids = {grid.device: grid}  # a run copies nothing: it may be captured in a graph

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    @property
    def nfe(self) -> int:
        return 2 * self.steps - int(self.base.afs)

    @property
    def depth(self) -> int:
        """Outputs a row reads: the start of a two-evaluation step is eliminated with one more."""
        if self.base.multistep and isinstance(self.process, RectifiedFlow):
            return self.nfe  # velocities of older states are written through all outputs since
        reads = self.base.reads if self.base.multistep or self.base.solver == "ddim" else 2
        return min(reads, self.nfe)

    @property
    def t_start(self) -> float:
        return float(self.grid[0])

    @property
    def needs_features(self) -> bool:
        return self.predictor.bottleneck

    def walk(self, device: torch.device | None = None) -> Walk[Form]:
        """The formulas on traced forms, with their own history."""
        device = self.grid.device if device is None else device
        if device not in self._grids:
            with torch.inference_mode(False):  # kept for runs outside of it
                self._grids[device] = self.grid.to(device)
        grid = self._grids[device]

        def scale(weight: Tensor, form: Form) -> Form:
            return form.__mul__(weight)  # torch.compile tries the tensor's operator first

        return Walk(self.base, self.process, grid, scale, self._asked)

    def decide(self, features: Tensor | None, n: int, at: tuple[Tensor, ...]) -> Choice:
        """The predictor's choice for step ``n`` (0-based) between the levels ``at`` ``[B]``."""
        choice: Choice = self.predictor(features, *at)
        return choice

    def place(self, device: torch.device) -> None:
        """Moves the predictor to ``device`` if it lies elsewhere."""
        if self.predictor.fc_r.weight.device != device:
            with torch.inference_mode(False):  # kept for runs outside of it
                self.predictor.to(device)

    def start(self, batch: int, device: torch.device) -> AmedRun:
        self.place(device)
        return self.run(batch, device)

    def run(self, batch: int, device: torch.device) -> AmedRun:
        """As ``start``, without moving the predictor."""
        return AmedRun(self, batch, device)

    # -- files and export -----------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON settings) for a solver file."""
        state = self.predictor.state_dict()
        tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        tensors["grid"] = self.grid.cpu()
        predictor = {
            "features": self.predictor.features,
            "scale_dir": self.predictor.scale_dir,
            "scale_time": self.predictor.scale_time,
            "bottleneck": self.predictor.bottleneck,
            "double": self.predictor.fc_r.weight.dtype == torch.float64,
        }
        return tensors, {
            "base": asdict(self.base),
            "predictor": predictor,
            "process": self.process.config(),
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], settings: dict[str, Any]) -> AmedPolicy:
        """Inverse of ``state``.

        Raises:
            ValueError: missing or unknown names, shapes or values that do not fit.
        """
        try:
            base = AmedBase(**settings["base"])
            shape = dict(settings["predictor"])
            dtype = torch.float64 if shape.pop("double") else torch.float32
            predictor = AmedPredictor(**shape).to(dtype)
            process = from_config(settings["process"])
            grid = tensors["grid"]
            predictor.load_state_dict({k: v for k, v in tensors.items() if k != "grid"})
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not the state of an AMED solver: {error}") from error
        return cls(predictor, base, process, grid)

    # -- as a table and for people --------------------------------------------------------------

    def static_table(self) -> None:
        """None: the predictor is called while sampling."""

    def mean(self, decision: Choice) -> Choice:
        """The mean of each number; ``[1]``."""
        return Choice(*(part.mean().reshape(1) for part in decision))

    def static_grid(self, decisions: dict[int, Choice]) -> Tensor:
        """The times between steps, which the predictor leaves alone."""
        return self.grid.cpu()

    def static_options(self) -> dict[str, Any]:
        return {**asdict(self.base), "method": "amed-static"}

    def describe(self) -> dict[str, Any]:
        """Base and size: the rows depend on the sample."""
        return {
            "kind": self.kind,
            "name": "amed",
            "base": asdict(self.base),
            "parameters": sum(p.numel() for p in self.predictor.parameters()),
            "grid": self.grid.tolist(),
        }


class AmedRun:
    """One run over one batch: the walk on traced forms, and the rows so far."""

    def __init__(self, policy: AmedPolicy, batch: int, device: torch.device) -> None:
        self._policy = policy
        self._batch = batch
        self._walk = policy.walk(device)
        self._rows = OnlineTrace(batch, policy.depth, device)
        self._step = 0
        self._choice: Choice | None = None  # of the step whose middle is being evaluated
        self._start = x = self._rows.start()
        grid = self._walk.grid
        if policy.base.afs:
            self._choose(None)
            y = self._walk.first(0, x, self._walk.analytic(x), self._chosen)
            self.initial_scale = y.states[START]
            self.time = self._walk.middle(0, self._chosen)[1]
        else:
            self.initial_scale = torch.ones((), dtype=torch.float64, device=device)
            self.time = grid[0].expand(batch)
        self._rows.begin(self.initial_scale)

    def row(self, n: int, features: Tensor | None) -> Row:
        """Row of evaluation ``n``: to the middle of a step, or from there to its end."""
        evaluated, m = self._rows.symbols(n)
        if self._choice is None:
            self._start = evaluated
            self._choose(features)
            following = self._walk.first(self._step, evaluated, m, self._chosen)
            time = self._walk.middle(self._step, self._chosen)[1]
            return Row(*self._rows.reduce(following, n), time)
        following = self._walk.second(self._step, self._start, evaluated, m, self._chosen)
        a, b = self._rows.reduce(following, n)
        self._choice = None
        self._step += 1
        if self._step == self._walk.steps:
            return Row(a, b, None)
        return Row(a, b, self._walk.grid[self._step].expand(self._batch))

    @property
    def _chosen(self) -> Choice:
        assert self._choice is not None
        return self._choice

    def _choose(self, features: Tensor | None) -> None:
        walk, i = self._walk, self._step
        levels = (walk.level(i).expand(self._batch), walk.level(i + 1).expand(self._batch))
        self._choice = self._policy.decide(features, i, levels)


register_policy(AmedPolicy)

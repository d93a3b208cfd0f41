"""The state of an LD3 run: what a checkpoint holds and what an interruption goes back to."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...support.parallel import World
from ..training.checkpoint import read_checkpoint, save_checkpoint
from .grid import LearnedGrid
from .pairs import Pairs


@dataclass
class Ld3State:
    """Everything of a run that is not a tensor."""

    round: int = 0
    position: int = 0  # mini-batch within the round, training set first
    updates: int = 0
    failures: int = 0  # validations in a row that did not improve
    whole: bool = False  # validate on the whole set, no longer on its first batch
    best_score: float = math.inf
    best_update: int = 0
    lr: float = 0.0
    lr_times: float = 0.0
    lr_noise: float = 0.0
    at_floor: int = 0
    moved: bool = False  # did a validation noise move in this round
    skipped: int = 0
    loss_scale: float = 1.0
    init: str = ""
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Ld3Store:
    """Parameters, RMSprop's moments, moved noises and counters of a run, saved and restored.

    Attributes:
        state: counters and rates.
        best: parameters with the least validation loss.
        pairs: ``"train"`` and ``"valid"``.
    """

    def __init__(
        self,
        module: LearnedGrid,
        optimiser: torch.optim.Optimizer,
        pairs: dict[str, Pairs],
        state: Ld3State,
        world: World,
        path: Path | None,
        fingerprint: dict[str, Any],
    ) -> None:
        self.module = module
        self.optimiser = optimiser
        self.pairs = pairs
        self.state = state
        self.path = path
        self._world = world
        self._fingerprint = fingerprint
        self.best = self.parameters()
        self._before: Any = None

    def parameters(self) -> dict[str, Tensor]:
        """A copy of the module's parameters."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    @torch.no_grad()
    def load(self, parameters: dict[str, Tensor]) -> None:
        """Copies ``parameters`` into the module."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(parameters[name])

    def keep_best(self, score: float) -> None:
        """The present parameters are the best so far."""
        self.state.best_score, self.state.best_update = score, self.state.updates
        self.best = self.parameters()

    def _moments(self) -> dict[str, Tensor]:
        held = self.optimiser.state.get(self.module.logits, {})
        return {key: torch.as_tensor(value).clone() for key, value in held.items()}

    def _load_moments(self, held: dict[str, Tensor]) -> None:
        self.optimiser.state.clear()
        if held:
            self.optimiser.state[self.module.logits] = held

    def remember(self, part: str, own: slice) -> None:
        """Call before a mini-batch that may change rows ``own`` of ``part``."""
        self._before = (
            dataclasses.replace(self.state),
            len(self.state.history),
            self.parameters(),
            self.best,
            self._moments(),
            (part, own, self.pairs[part].noise[own].clone()),
        )

    def rewind(self) -> None:
        """Back to the last ``remember``: half a mini-batch is never saved."""
        if self._before is None:
            return
        self.state, length, parameters, self.best, held, (part, own, noise) = self._before
        del self.state.history[length:]
        self.load(parameters)
        self._load_moments(held)
        self.pairs[part].noise[own] = noise

    def save(self) -> None:
        """Writes the checkpoint, if there is a place for one; with several ranks all must call."""
        if self.path is None:
            return
        tensors = {f"noise/{part}": pairs.gathered() for part, pairs in self.pairs.items()}
        if self._world.rank != 0:
            return
        tensors |= {f"raw/{k}": v for k, v in self.parameters().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= {f"rmsprop/{k}": v for k, v in self._moments().items()}
        save_checkpoint(self.path, tensors, self.state, self._fingerprint)

    def resume(self) -> bool:
        """Loads the checkpoint, if there is one."""
        found = self.path is not None and self.path.exists()
        self._world.check_equal(int(found), "whether there is a checkpoint to resume")
        if self.path is None or not found:
            return False
        tensors, state = read_checkpoint(self.path, self._fingerprint)
        self.state = Ld3State(**state)
        for part, pairs in self.pairs.items():
            pairs.noise = tensors[f"noise/{part}"].to(pairs.centres.device)
        self.load(_part(tensors, "raw/"))
        self.best = _part(tensors, "best/")
        self._load_moments(_part(tensors, "rmsprop/"))
        return True


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

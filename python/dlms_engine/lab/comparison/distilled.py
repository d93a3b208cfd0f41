"""One contestant distilled within the budget, or read back from an earlier run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ...learners import distill
from ...learners.start.problem import Conditions, SamplingProblem, read_conditions
from ...learners.training.identity import conditions_digest
from ...models.denoiser import Denoiser
from ...policies.distilled import load_solver
from ...solvers.policy import Policy
from ...support.files import only_one, write_text
from .budget import Calls, affordable, counted, fewer_for
from .contestants import Contestant
from .result import Cost
from .store import model_digest


@dataclass(frozen=True)
class Distilled:
    """A learned solver and what it cost.

    Attributes:
        policy: the solver.
        trajectories: start noises it was trained on.
        forward, backward: network calls of the training, one a sample, validation included.
        seconds: wall time of the training.
    """

    policy: Policy
    trajectories: int | None
    forward: int
    backward: int
    seconds: float

    @property
    def cost(self) -> Cost:
        return {
            "trajectories": self.trajectories,
            "forward": self.forward,
            "backward": self.backward,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Workshop:
    """Distils contestants on one model and keeps solver files with their costs in ``folder``.

    A file made with other settings, another budget or another model is made again. What was
    interrupted starts over: a contestant takes minutes, and its cost is counted in one piece.

    Attributes:
        budget: network calls, forward and backward, a contestant may spend.
        advance: called with the number of network calls as they are made, those that measure what a
            training costs included.
        conditions: the network's keyword arguments, ``learners.start.Conditions``.
        trajectories: start noises a distillation takes; None for what ``budget`` pays for.
    """

    denoiser: Denoiser
    features: nn.Module
    shape: tuple[int, ...]
    folder: Path
    budget: int
    advance: Callable[[int], None]
    conditions: Conditions = None
    trajectories: int | None = None

    @cached_property
    def _model(self) -> str:
        """Hashed once, not for every contestant and count."""
        return model_digest(SamplingProblem(self.denoiser, self.shape, self.conditions))

    def distilled(self, contestant: Contestant, nfe: int, seed: int = 0) -> Distilled:
        """The solver of ``nfe`` evaluations, trained on the noise of ``seed``.

        Raises:
            ValueError: the method has no solver of that cost, or the budget is too small.
        """
        stem = f"{_file_name(contestant.label)}-{nfe}" + (f"-seed{seed}" if seed else "")
        path = self.folder / f"{stem}.safetensors"
        facts_path = path.with_suffix(".json")
        key = self._key(contestant, nfe, seed)
        with only_one(facts_path, wait=True):  # another comparison in this folder makes it once
            held = _read(facts_path)
            if path.exists() and held.get("key") == key:
                policy = load_solver(path).policy
                if policy.process == self.denoiser.process:
                    return Distilled(policy, **held["cost"])
            found = self._make(contestant, nfe, seed, path)
            write_text(facts_path, json.dumps({"key": key, "cost": found.cost}, indent=1))
        return found

    def _make(self, contestant: Contestant, nfe: int, seed: int, path: Path) -> Distilled:
        trajectories = contestant.trajectories
        if contestant.scales:
            trajectories = self.trajectories or affordable(
                lambda count: self._run(contestant, nfe, count, None, seed, self.advance)[1].total,
                self.budget,
                contestant.batch,
            )
        started = time.perf_counter()
        policy, calls = self._run(contestant, nfe, trajectories, path, seed, self.advance)
        fewer = fewer_for(trajectories, calls.total, self.budget, contestant.batch)
        if contestant.scales and self.trajectories is None and fewer is not None:
            trajectories, started = fewer, time.perf_counter()
            policy, calls = self._run(contestant, nfe, trajectories, path, seed, self.advance)
        seconds = time.perf_counter() - started
        return Distilled(policy, trajectories, calls.forward, calls.backward, seconds)

    def _run(
        self,
        contestant: Contestant,
        nfe: int,
        trajectories: int | None,
        output: Path | None,
        seed: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Policy, Calls]:
        settings = dict(contestant.settings)
        if contestant.budgeted:
            settings["budget"] = f"{self.budget}calls"
        with counted(self.denoiser.network, advance) as calls:
            solver = distill(
                self.denoiser,
                contestant.method,
                nfe=nfe,
                shape=self.shape,
                conditions=self.conditions,
                trajectories=trajectories,
                output=output,
                progress=False,
                seed=seed,
                feature_network=self.features,
                **settings,
            )
        return solver.policy, calls

    def _key(self, contestant: Contestant, nfe: int, seed: int) -> dict[str, Any]:
        described = {k: v for k, v in asdict(contestant).items() if k not in ("label", "base")}
        scaled = contestant.scales and self.trajectories is None
        if contestant.scales and not scaled:
            described["trajectories"] = self.trajectories
        key = {
            **described,
            "nfe": nfe,
            "budget": self.budget if scaled or contestant.budgeted else None,
            "seed": seed,
            "model": self._model,
            "conditions": conditions_digest(read_conditions(self.conditions)),
        }
        plain: dict[str, Any] = json.loads(json.dumps(key, default=str))
        return plain


def _file_name(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent or damaged: made again
        return {}
    return held if isinstance(held, dict) else {}

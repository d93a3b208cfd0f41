"""Several samplers over the same seeds: endpoint error and feature moments, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import grids, solvers
from ..denoiser import Denoiser
from ..policy import Policy
from ..sampler import Sampler, seeded_noise
from ..table import SolverTable
from .frechet import FeatureSums, feature_sums
from .memo import memoised
from .store import Store, digest, network_digest

SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Entry:
    """A sampler to be measured.

    Attributes:
        label: what it is called in tables and plots; unique for one nfe.
        policy: a table or a learned policy.
        learned: False for a handcrafted solver.
        facts: JSON-able options, for the record.
    """

    label: str
    policy: SolverTable | Policy
    learned: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        return int(self.policy.nfe)

    @property
    def digest(self) -> str:
        """Identifies the numbers of the sampler, not its label."""
        policy = self.policy
        if isinstance(policy, SolverTable):
            held = {"a": policy.a, "b": policy.b, "times": policy.times}
            return digest({**held, "scale": policy.initial_scale}, policy.prediction)
        tensors, settings = policy.state()  # type: ignore[attr-defined]
        return digest(tensors, settings)


@dataclass(frozen=True)
class Measured:
    """Result for one entry."""

    rmse: float  # nan without an exact solution
    sums: FeatureSums


class Measurer:
    """Runs entries on one model; what was run before is read from ``store``.

    Args:
        denoiser: the model.
        features: module from finished samples ``[B, ...]`` to ``[B, F]``.
        shape: shape of one sample.
        batch: samples per run.
        advance: told the network evaluations (per sample) that were done or found done.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        features: nn.Module,
        shape: tuple[int, ...],
        store: Store,
        *,
        batch: int = 250,
        advance: Callable[[int], None] = lambda _done: None,
    ) -> None:
        self.denoiser = denoiser
        self.features = features
        self.shape = shape
        self.batch = batch
        self._store = store
        self._advance = advance
        self._twin, self._memo = memoised(denoiser)
        process = denoiser.process
        start = torch.tensor(process.t_max, dtype=torch.float64)
        self._scale = float(process.sigma(start))
        self._model = [network_digest(denoiser.network), network_digest(features)]

    def accurate_table(self, nfe: int) -> SolverTable:
        """DPM-Solver++(3M) on the rho-7 grid: what "accurate" and "exact" mean here."""
        process = self.denoiser.process
        return solvers.dpm_solver_pp(process, grids.polynomial(process, nfe), order=3)

    @torch.no_grad()
    def endpoints(self, nfe: int, seeds: range) -> Tensor:
        """Exact solutions ``[len(seeds), *shape]`` of the ODE from each seed's noise."""
        key = self._key([Entry("exact", self.accurate_table(nfe))], seeds)
        held = self._store.load("exact", key)
        done = int(held["done"]) if held else 0
        x = held["x"] if held else torch.zeros(len(seeds), *self.shape)
        self._advance(done * nfe)
        sampler = Sampler(self.denoiser, self.accurate_table(nfe))
        for start in range(done, len(seeds), self.batch):
            part = seeds[start : start + self.batch]
            x[start : start + len(part)] = self._run(sampler, self._noise(part))
            done = start + len(part)
            self._store.save("exact", key, {"x": x, "done": torch.tensor(done)})
        return x

    @torch.no_grad()
    def sums(self, images: Tensor) -> FeatureSums:
        """Feature sums of finished images ``[B, ...]``, clamped to [-1, 1] as a file would be."""
        features = [self.features(part.clamp(-1, 1)) for part in torch.split(images, self.batch)]
        return feature_sums(torch.cat(features))

    @torch.no_grad()
    def measure(
        self, name: str, entries: Sequence[Entry], seeds: range, exact: Tensor | None = None
    ) -> list[Measured]:
        """One result an entry; ``exact`` ``[n, ...]`` belongs to the first n seeds."""
        key = self._key(entries, seeds, len(exact) if exact is not None else 0)
        state = self._store.load(name, key) or self._empty(len(entries))
        done = int(state["done"])
        self._advance(done * sum(entry.nfe for entry in entries))
        samplers = [self._sampler(entry) for entry in entries]
        saved = time.monotonic()
        for start in range(done, len(seeds), self.batch):
            part = seeds[start : start + self.batch]
            noise = self._noise(part)
            self._memo.forget()
            target = None if exact is None else exact[start : start + len(part)]
            for row, sampler in enumerate(samplers):
                self._add(state, row, self._run(sampler, noise), target)
            done = start + len(part)
            state["done"] = torch.tensor(done)
            if done == len(seeds) or time.monotonic() - saved > SAVE_SECONDS:
                self._store.save(name, key, state)
                saved = time.monotonic()
        self._memo.forget()
        return [self._result(state, row, done) for row in range(len(entries))]

    # -- parts ----------------------------------------------------------------------------------

    def _noise(self, seeds: range) -> Tensor:
        return seeded_noise(seeds, self.shape, self._scale)

    def _sampler(self, entry: Entry) -> Sampler:
        static = isinstance(entry.policy, SolverTable)
        return Sampler(self._twin if static else self.denoiser, entry.policy)

    def _run(self, sampler: Sampler, noise: Tensor) -> Tensor:
        x = sampler(noise)
        assert isinstance(x, Tensor)
        self._advance(sampler.nfe * len(noise))
        return x

    def _key(self, entries: Sequence[Entry], seeds: range, exact: int = 0) -> dict[str, Any]:
        return {
            "model": self._model,
            "process": self.denoiser.process.config(),
            "entries": [entry.digest for entry in entries],
            "seeds": [seeds.start, seeds.stop],
            "exact": exact,
            "batch": self.batch,
        }

    def _empty(self, entries: int) -> dict[str, Tensor]:
        f = self.features(torch.zeros(1, *self.shape)).shape[1]
        return {
            "done": torch.tensor(0),
            "total": torch.zeros(entries, f, dtype=torch.float64),
            "outer": torch.zeros(entries, f, f, dtype=torch.float64),
            "error": torch.zeros(entries, dtype=torch.float64),
            "compared": torch.zeros(entries, dtype=torch.float64),
        }

    def _add(self, state: dict[str, Tensor], row: int, x: Tensor, target: Tensor | None) -> None:
        found = self.sums(x)
        state["total"][row] += found.total
        state["outer"][row] += found.outer
        if target is not None and len(target):
            difference = x[: len(target)].double() - target.double()
            state["error"][row] += difference.square().sum()
            state["compared"][row] += difference.numel()

    @staticmethod
    def _result(state: dict[str, Tensor], row: int, count: int) -> Measured:
        compared = float(state["compared"][row])
        rmse = math.sqrt(float(state["error"][row]) / compared) if compared else math.nan
        sums = FeatureSums(torch.tensor(count), state["total"][row], state["outer"][row])
        return Measured(rmse, sums)

"""Several samplers over the same seeds: endpoint error and feature moments, resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.noise import seeded_noise
from ...engine.sampler import Sampler
from ...learners.start.problem import Conditions, SamplingProblem, read_conditions, rows_of
from ...learners.start.shared_runs import SharedRuns
from ...learners.training.identity import conditions_digest
from ...learners.training.validation import accurate_table
from ...models.denoiser import Denoiser
from ...solvers.file import StatePolicy
from ...solvers.policy import Policy
from ...solvers.table import SolverTable
from ...support.parallel import World
from ...support.transfer import to_host
from ..evaluation.frechet import FeatureSums, feature_sums
from .store import Store, digest, model_digest, network_digest

SAVE_SECONDS = 20.0
SUMMED = ("total", "outer", "error", "compared")


@dataclass(frozen=True)
class Entry:
    """A sampler to be measured.

    Attributes:
        label: what it is called in tables and plots; unique for one nfe.
        policy: a table or a learned policy.
        method: the learner that made it; None for a handcrafted solver.
    """

    label: str
    policy: Policy
    method: str | None = None

    @property
    def learned(self) -> bool:
        return self.method is not None

    @property
    def nfe(self) -> int:
        return int(self.policy.nfe)

    @property
    def digest(self) -> str:
        """Identifies the numbers of the sampler, not its label."""
        policy = self.policy
        table = policy.static_table()
        if table is not None:
            held = {"a": table.a, "b": table.b, "times": table.times}
            return digest({**held, "scale": table.initial_scale}, table.prediction)
        assert isinstance(policy, StatePolicy)
        return digest(*policy.state())


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
        conditions: keyword arguments of the network, ``learners.start.Conditions``; a sample's number
            is its seed.
        advance: called with the network evaluations (per sample) done, or found done in the store.
        clamp: samples are images, clamped to [-1, 1] before their features as a file would be.
        save_seconds: between writes to the store; 0 writes every batch, None is ``SAVE_SECONDS``.
        world: ranks that share the work; None for the current ones.

    Ranks take whole batches, and what the batches give is added in their order: every figure has the
    same bits for any number of ranks. Rank 0 alone writes to the store, which all must see.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        features: nn.Module,
        shape: tuple[int, ...],
        store: Store,
        *,
        batch: int = 250,
        conditions: Conditions = None,
        advance: Callable[[int], None] = lambda _done: None,
        clamp: bool = True,
        save_seconds: float | None = None,
        world: World | None = None,
    ) -> None:
        self._clamp = clamp
        self._save_seconds = SAVE_SECONDS if save_seconds is None else save_seconds
        self.world = world or World.current()
        self.denoiser = denoiser
        self.features = features
        self.shape = shape
        self.batch = batch
        given = read_conditions(conditions)
        self._problem = SamplingProblem(denoiser, shape, given)
        self.conditions = self._problem.conditions
        self._store = store
        self.advance = advance
        self._width: int | None = None
        self._scale = float(denoiser.process.sigma(denoiser.process.t_max))
        self._model: list[str | None] = [model_digest(self._problem), network_digest(features)]
        self._model += [] if clamp else ["not clamped"]
        if given is not None:
            self._model.append(conditions_digest(given))

    def accurate_table(self, nfe: int) -> SolverTable:
        """What "accurate" and "exact" mean here: ``validation.accurate_table``, proved off EDM."""
        return accurate_table(self.denoiser, torch.Size(self.shape), nfe, self.conditions)

    def accurate(
        self, nfe: int, seeds: range, exact: Tensor | None = None
    ) -> tuple[Measured, Measured]:
        """Accurate samples of ``seeds`` and of as many others: what distances are taken to."""
        entries = [Entry("accurate", self.accurate_table(nfe))]
        others = range(seeds.stop, seeds.stop + len(seeds))
        own = self.measure("accurate-own", entries, seeds, exact)[0]
        return own, self.measure("accurate-other", entries, others)[0]

    @torch.no_grad()
    def endpoints(self, nfe: int, seeds: range) -> Tensor:
        """Exact solutions ``[len(seeds), *shape]`` of the ODE from each seed's noise."""
        table = self.accurate_table(nfe)
        key = self._key([Entry("exact", table)], seeds)
        held = self._load("exact", key)
        done = int(held["done"]) if held else 0
        x = held["x"] if held else torch.zeros(len(seeds), *self.shape)
        self.advance(done * nfe)
        sampler = Sampler(self.denoiser, table)
        for parts in self._rounds(seeds[done:]):
            own = self.world.deal(range(len(parts)))
            found = torch.zeros(self.batch, *self.shape)
            if own is not None:
                found[: len(parts[own])] = to_host(self._run(sampler, parts[own]))
            for part, images in zip(parts, self.world.gather(found), strict=False):
                x[done : done + len(part)] = images[: len(part)]
                done += len(part)
            self._advance_others(parts, nfe)
            self._save("exact", key, {"x": x, "done": torch.tensor(done)})
        return x

    @torch.no_grad()
    def sums(self, images: Tensor) -> FeatureSums:
        """Feature sums, on the CPU, of finished samples ``[B, ...]``."""
        held = images.to(self.denoiser.device)
        parts = torch.split(held.clamp(-1, 1) if self._clamp else held, self.batch)
        sums = feature_sums(torch.cat([self.features(part) for part in parts]))
        return FeatureSums(*map(to_host, sums))

    @torch.no_grad()
    def measure(
        self,
        name: str,
        entries: Sequence[Entry],
        seeds: range,
        exact: Tensor | None = None,
        *,
        share: bool = False,
    ) -> list[Measured]:
        """One result an entry; ``exact`` ``[n, ...]`` belongs to the first n seeds.

        Args:
            share: make evaluations that several tables begin with once. Figures then differ in their
                last digits from those of a table that runs alone.
        """
        key = self._key(entries, seeds, len(exact) if exact is not None else 0)
        state = self._load(name, key) or self._empty(len(entries))
        done = int(state["done"])
        self.advance(done * sum(entry.nfe for entry in entries))
        run = self._shared(entries) if share else self._each(entries)
        saved = time.monotonic()
        for parts in self._rounds(seeds[done:]):
            own = self.world.deal(range(len(parts)))
            found = self._empty(len(entries))
            if own is not None:
                first = parts[own].start - seeds.start
                target = None if exact is None else exact[first : first + len(parts[own])]
                for row, x in enumerate(run(parts[own])):
                    self._add(found, row, x, target)
            for held in SUMMED:  # one after the other, as a single process would
                for _, value in zip(parts, self.world.gather(found[held]), strict=False):
                    state[held] += value
            done += sum(len(part) for part in parts)
            state["done"] = torch.tensor(done)
            self._advance_others(parts, sum(entry.nfe for entry in entries))
            if done == len(seeds) or time.monotonic() - saved >= self._save_seconds:
                self._save(name, key, state)
                saved = time.monotonic()
        return [self._result(state, row, done) for row in range(len(entries))]

    # -- parts ----------------------------------------------------------------------------------

    def _rounds(self, seeds: range) -> list[list[range]]:
        """The batches of ``seeds`` in rounds of one a rank."""
        parts = [seeds[i : i + self.batch] for i in range(0, len(seeds), self.batch)]
        return [[parts[k] for k in chosen] for chosen in self.world.rounds(len(parts))]

    def _load(self, name: str, key: dict[str, Any]) -> dict[str, Tensor] | None:
        """What is stored, if all ranks see the same of it."""
        held = self._store.load(name, key)
        done = int(held["done"]) if held else 0
        seen = {int(value) for value in self.world.gather(torch.tensor(done))}
        return held if len(seen) == 1 else None

    def _save(self, name: str, key: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if self.world.rank == 0:
            self._store.save(name, key, tensors)

    def _advance_others(self, parts: list[range], nfe: int) -> None:
        """Tells of the evaluations that the other ranks did meanwhile."""
        own = self.world.deal(range(len(parts)))
        self.advance(nfe * sum(len(part) for k, part in enumerate(parts) if k != own))

    def _noise(self, seeds: range) -> Tensor:
        return seeded_noise(seeds, self.shape, self._scale, device=self.denoiser.device)

    def _each(self, entries: Sequence[Entry]) -> Callable[[range], Iterator[Tensor]]:
        """What runs one entry after the other."""
        samplers = [Sampler(self.denoiser, entry.policy) for entry in entries]
        return lambda seeds: (self._run(sampler, seeds) for sampler in samplers)

    def _shared(self, entries: Sequence[Entry]) -> Callable[[range], Iterator[Tensor]]:
        """What runs the entries, tables all of them, together."""
        tables = [entry.policy for entry in entries if isinstance(entry.policy, SolverTable)]
        assert len(tables) == len(entries)
        runs = SharedRuns(tables)

        def run(seeds: range) -> Iterator[Tensor]:
            noise = self._noise(seeds)
            parts = runs.ends(self._problem.predict, noise, seeds.start)
            ends = torch.cat([end for _, end in parts], dim=1)
            self.advance(sum(entry.nfe for entry in entries) * len(seeds))
            return iter(ends)

        return run

    def _run(self, sampler: Sampler, seeds: range) -> Tensor:
        x = sampler(self._noise(seeds), **rows_of(self.conditions, seeds))
        assert isinstance(x, Tensor)
        self.advance(sampler.nfe * len(seeds))
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
        if self._width is None:
            zeros = torch.zeros(1, *self.shape, device=self.denoiser.device)
            self._width = int(self.features(zeros).shape[1])
        f = self._width
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
            difference = x[: len(target)].double() - target.to(x.device).double()
            state["error"][row] += to_host(difference.square().sum())
            state["compared"][row] += difference.numel()

    @staticmethod
    def _result(state: dict[str, Tensor], row: int, count: int) -> Measured:
        compared = float(state["compared"][row])
        rmse = math.sqrt(float(state["error"][row]) / compared) if compared else math.nan
        sums = FeatureSums(torch.tensor(count), state["total"][row], state["outer"][row])
        return Measured(rmse, sums)

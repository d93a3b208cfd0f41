"""Runs a table or a policy on a denoiser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..models.denoiser import Denoiser
from ..policies.corrector import CorrectedPolicy, Correctors
from ..policies.run import run_predictions
from ..processes.base import as_float64
from ..solvers.policy import Policy, Solved, policy_of
from ..solvers.table import SolverTable
from ..support.versioned import Versioned
from . import cpu_loop
from .cuda_graph import run_captured
from .cuda_graph_cache import GraphCache, split_tensors
from .cuda_graph_loop import table_loop
from .dlms_steps import policy_steps
from .fits import check_fit
from .noise import Rng, seeded_noise
from .steps import (
    AfterRow,
    EnginePool,
    Steps,
    TableRows,
    TableSteps,
    guidance,
    level_dtype,
    plan_table,
    run_plain,
)
from .watching import Callback, Step, Watchers

__all__ = ["GRAPHS", "Callback", "Sampler", "Step"]

_log = logging.getLogger("dlms_engine")

GRAPHS = GraphCache()
"""Captured runs of all samplers of this process; bounded, least recently used first out."""


class Sampler(Versioned, nn.Module):
    """Samples with ``policy`` (a ``SolverTable`` or a learned policy) on ``denoiser``.

    Args:
        denoiser: the network, made to answer E[x0 | x, t].
        policy: a table from ``dlms_engine.solvers`` or a distilled solver.
        backend: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``. An explicit choice
            that is not available raises ``BackendUnavailable``; ``"auto"`` falls back.
        dtype: dtype of state and history, float32 (float64 for verification).
        check_finite: whether samples that are not finite are reported (once, with the evaluation). None
            checks on the CPU only: on a GPU the check makes the host wait for the run.

    Raises:
        ValueError: the policy belongs to another process than the denoiser's, needs features that it
            does not tap, or a float64 state meets a network of another dtype.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Policy | Solved,
        *,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        check_finite: bool | None = None,
    ) -> None:
        super().__init__()
        policy = policy_of(policy)
        check_fit(denoiser, policy, dtype)
        self.denoiser = denoiser
        self.correctors: Correctors | None = None
        if isinstance(policy, CorrectedPolicy):
            self.correctors, policy = policy.correctors, policy.rows
        self.policy = policy
        self.dtype = dtype
        self.backend = backend
        ops.select(backend)
        self._engines = EnginePool()
        self.check_finite = check_finite
        self._plans: dict[Any, TableRows] = {}
        self._warned_not_finite = False
        if self._table is not None:
            self._plan(torch.device("cpu"))
        self._place_policy()

    def _place_policy(self) -> None:
        """Moves a learned policy to the network, ahead of a run: torch.compile cannot move it."""
        place = getattr(self.policy, "place", None)
        if place is not None and isinstance(self.denoiser.network, nn.Module):
            place(self.denoiser.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sampler:
        """What ``to``, ``cuda`` and the like do; the policy, which is no module, follows."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_policy()
        return self

    @property
    def _table(self) -> SolverTable | None:
        return self.policy.static_table()

    @property
    def nfe(self) -> int:
        """Network evaluations of one run (a guided evaluation counts once)."""
        return int(self.policy.nfe)

    def sample(
        self, seeds: Sequence[int], shape: Sequence[int], *, rng: Rng = "cpu", **options: Any
    ) -> Any:
        """Samples from one seed each: ``[len(seeds), *shape]``, the same in any batch.

        ``rng`` as in ``seeded_noise``; the other options are those of a call.
        """
        sigma = float(self.policy.process.sigma(self._start_time()))
        place = self.denoiser.device
        return self(
            seeded_noise(seeds, shape, sigma, device=place, dtype=self.dtype, rng=rng), **options
        )

    def _start_time(self) -> Tensor:
        return as_float64(self.policy.t_start).reshape(-1)[0]

    @torch.no_grad()
    def forward(
        self,
        noise: Tensor,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        return_trajectory: bool = False,
        **conditions: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs all rows.

        Args:
            noise: ``[B, ...]`` the state at the grid's start (``sigma_max * z`` for EDM), on the
                network's device; from the CPU it is moved there, once.
            callback: called with a ``Step`` after each row.
            progress: shows a progress bar.
            return_trajectory: also returns the states ``[nfe + 1, B, ...]``.
            conditions: the network's keyword arguments.

        Returns:
            ``[B, ...]`` in the state dtype, or ``(sample, trajectory)``.
        """
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise is {type(noise).__name__}, expected a tensor [B, ...]")
        if noise.is_complex() or noise.dtype == torch.bool:
            raise ValueError(f"noise is {noise.dtype}, expected floating point [B, ...]")
        place = self.denoiser.device if noise.device.type == "cpu" else noise.device
        watchers = Watchers(self.nfe, callback, progress, return_trajectory)
        try:
            # A captured run copies its inputs itself; every other overwrites the state.
            copy = not self._captures(place, watchers.present)
            x = noise.to(place, self.dtype, copy=copy, memory_format=torch.contiguous_format)
            x = self._run(x, watchers.begin(x), conditions)
        finally:
            watchers.end()
        if not self._warned_not_finite and not self._is_finite(x):
            again = noise.to(place, self.dtype, copy=True, memory_format=torch.contiguous_format)
            self._tell_where(again, conditions)
        return (x, watchers.trajectory()) if return_trajectory else x

    def _is_finite(self, x: Tensor) -> bool:
        """Whether the samples are finite; True unlooked where looking would make the host wait."""
        look = x.device.type == "cpu" if self.check_finite is None else self.check_finite
        if not look or torch.compiler.is_compiling() or type(x) is not Tensor:
            return True
        return bool(torch.isfinite(x).all())

    def _tell_where(self, x: Tensor, conditions: dict[str, Any]) -> None:
        """Says once which evaluation gave the first number that is not finite: runs once more."""
        self._warned_not_finite = True
        first: list[int] = []

        def after(n: int, state: Tensor) -> None:
            if not first and not bool(torch.isfinite(state).all()):
                first.append(n)

        self._run(x, after, conditions)
        where = f"from evaluation {first[0] + 1} of {self.nfe} on" if first else "at the end"
        _log.warning(
            "the samples are not finite %s: the network's output overflows (float16 instead of "
            "bfloat16?), or its prediction type or time range is another one",
            where,
        )

    def _run(self, x: Tensor, after: AfterRow | None, conditions: dict[str, Any]) -> Tensor:
        if self.denoiser.dynamic_thresholding is not None:
            correctors = self._placed_correctors(x.device)
            return run_predictions(self.denoiser, self.policy, x, conditions, after, correctors)
        backend = ops.select(self.backend, x.device)
        network_dtype = self._network_dtype(x)
        if torch.compiler.is_compiling():
            return self._run_plain(self._steps(x, conditions), x, network_dtype, backend, after)
        if (
            backend.name == "cpu"
            and cpu_loop.loop_available()
            and x.numel()
            and self.correctors is None
        ):
            return self._engines.run(self._steps(x, conditions), x, network_dtype, after)
        if self._captures(x.device, after is not None) and x.numel():
            return self._run_graph(x, network_dtype, backend, conditions)
        return self._run_plain(self._steps(x, conditions), x, network_dtype, backend, after)

    def _run_plain(
        self,
        steps: Steps,
        x: Tensor,
        network_dtype: torch.dtype,
        backend: ops.Backend,
        after: AfterRow | None,
    ) -> Tensor:
        correctors = self._placed_correctors(x.device)
        return run_plain(steps, x, network_dtype, backend, after, correctors)

    def _placed_correctors(self, device: torch.device) -> Correctors | None:
        """The correctors, moved to ``device`` if they lie elsewhere; None without any."""
        if self.correctors is not None and next(self.correctors.parameters()).device != device:
            with torch.inference_mode(False):  # kept for runs outside of it
                self.correctors.to(device)
        return self.correctors

    def _captures(self, device: torch.device, watched: bool) -> bool:
        """Whether runs on `device` are captured where they can be."""
        return (
            device.type == "cuda"
            and not watched
            and self.denoiser.dynamic_thresholding is None
            and not torch.compiler.is_compiling()
            and ops.select(self.backend, device).name != "eager"
        )

    def _network_dtype(self, x: Tensor) -> torch.dtype:
        """Dtype of the rows' network side, never wider than the state."""
        dtype = self.denoiser.network_dtype or x.dtype
        return x.dtype if dtype == torch.float64 else dtype

    # -- steps --------------------------------------------------------------------------------

    def _plan(self, device: torch.device) -> TableRows:
        # The guidance scale may change from run to run; it is a number of every row.
        key = (device, level_dtype(self.denoiser, self.dtype), guidance(self.denoiser))
        plan = self._plans.get(key)
        if plan is None:
            assert self._table is not None
            if len(self._plans) >= 16:
                self._plans.clear()
            with torch.inference_mode(False):  # kept for runs outside of it
                plan = plan_table(self.denoiser, self._table, self.dtype, device)
            self._plans[key] = plan
        return plan

    def _steps(self, x: Tensor, conditions: dict[str, Any], plan: TableRows | None = None) -> Steps:
        if self._table is not None:
            if x.ndim:
                self._table.require_batch(x.shape[0])
            return TableSteps(
                self.denoiser, plan or self._plan(x.device), self._table.depth, conditions
            )
        backend = ops.select(self.backend, x.device).name
        return policy_steps(self.denoiser, self.policy, x, self.dtype, conditions, backend)

    def _run_graph(
        self,
        x: Tensor,
        network_dtype: torch.dtype,
        backend: ops.Backend,
        conditions: dict[str, Any],
    ) -> Tensor:
        """The whole run as one CUDA graph where it can be captured, else the plain loop.

        Rows and noise levels are inputs of the graph: other tables of this depth and length replay
        the same capture.
        """
        conditions = {**self.denoiser.batch_conditions(len(x)), **conditions}
        given_conditions, fixed, rebuild = split_tensors(conditions)
        inputs = {"x": x, **given_conditions}
        options: tuple[Any, ...] = (backend.name, self.dtype, guidance(self.denoiser), fixed)
        if self._table is not None:
            inputs |= {f"plan/{k}": v for k, v in self._plan(x.device)._asdict().items()}
            options = (*options, self.policy.depth)
        # Read where they lie, and copied there before the run if they lie elsewhere.
        read = self.denoiser.unconditional_read(conditions)
        options = (*options, *((t.data_ptr(), t.shape, t.dtype) for t in read))

        def body(given: Mapping[str, Tensor]) -> Tensor:
            plan = None
            if "plan/rows" in given:
                plan = TableRows(given["plan/rows"], given["plan/c_noise"], given["plan/c_in"])
            steps = self._steps(given["x"], rebuild(given), plan)
            sample = self._run_plain(steps, given["x"], network_dtype, backend, None)
            # Of a capture it would be memory of the graph, which other runs overwrite.
            self.denoiser.calls.tap.keep(None)
            return sample

        learned: tuple[Any, ...] = () if self._table is not None else (self.policy,)
        if self.correctors is not None:
            learned = (*learned, self._placed_correctors(x.device))
        loop = None
        if self._table is not None and self.correctors is None and GRAPHS.loop != "never":
            depth = self._table.depth
            loop = table_loop(self.denoiser, depth, network_dtype, backend, rebuild)
        return run_captured(GRAPHS, self.denoiser, options, body, inputs, learned, loop)

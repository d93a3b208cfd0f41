"""Runs a table or a policy on a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import ops
from .denoiser import Denoiser, per_sample
from .ops import layout
from .policy import Policy, PolicyRun, TableRun
from .table import SolverTable


class Step(NamedTuple):
    """What a callback is told after each row."""

    index: int  # 0 .. nfe - 1
    nfe: int
    x: Tensor  # [B, ...] the state after the row; the live buffer: clone it to keep it


Callback = Callable[[Step], None]


class Plan(NamedTuple):
    """A static table made ready for one device and one denoiser."""

    rows: Tensor  # [nfe, R] or [nfe, B, R], state dtype
    c_noise: Tensor  # [nfe] or [nfe, B], float64
    c_in: Tensor  # [] or [B], float64: scale of the first network input, initial_scale included


class Sampler(nn.Module):
    """Samples with ``policy`` (a ``SolverTable`` or a learned policy) on ``denoiser``.

    Args:
        denoiser: the network, made to answer E[x0 | x, t].
        policy: a table from ``dlms_engine.solvers`` or a distilled solver.
        backend: ``"auto"``, ``"eager"``, ``"cpu"``, ``"cuda"`` or ``"triton"``. An explicit choice
            that cannot be had raises ``BackendUnavailable``; ``"auto"`` falls back.
        dtype: dtype of state and history, float32 (float64 for verification).

    Raises:
        ValueError: the policy belongs to another process than the denoiser's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: SolverTable | Policy,
        *,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float64 (state)")
        policy = getattr(policy, "policy", policy)
        if policy.process.config() != denoiser.process.config():
            raise ValueError(
                f"the solver was made for {policy.process.config()}, the denoiser runs "
                f"{denoiser.process.config()}: make or distil the solver on the denoiser's process"
            )
        self.denoiser = denoiser
        self.policy = policy
        self.dtype = dtype
        self.backend = backend
        ops.select(backend, torch.device("cpu") if backend in ("auto", "eager", "cpu") else None)
        self._plans: dict[torch.device, Plan] = {}
        if isinstance(policy, SolverTable):
            self._plans[torch.device("cpu")] = self._plan(policy, torch.device("cpu"))

    @property
    def nfe(self) -> int:
        """Network evaluations of one run (a guided evaluation counts once)."""
        return int(self.policy.nfe)

    def sample(self, seeds: Sequence[int], shape: Sequence[int], **options: Any) -> Any:
        """Samples from one seed each: ``[len(seeds), *shape]``, the same in any batch."""
        sigma = float(self.policy.process.sigma(self._start_time()))
        return self(seeded_noise(seeds, shape, sigma, dtype=self.dtype), **options)

    def _start_time(self) -> Tensor:
        return torch.as_tensor(self.policy.t_start, dtype=torch.float64).reshape(-1)[0]

    @torch.no_grad()
    def forward(
        self,
        noise: Tensor,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        return_trajectory: bool = False,
        **cond: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Runs all rows.

        Args:
            noise: ``[B, ...]`` the state at the grid's start (``sigma_max * z`` for EDM).
            callback: called with a ``Step`` after each row.
            progress: shows a progress bar.
            return_trajectory: also returns the states ``[nfe + 1, B, ...]``.
            cond: handed to the network.

        Returns:
            ``[B, ...]`` in the state dtype, or ``(sample, trajectory)``.
        """
        states: list[Tensor] = []
        calls: list[Callback] = [callback] if callback is not None else []
        if return_trajectory:
            states.append(noise.to(self.dtype, copy=True))
            calls.append(lambda step: states.append(step.x.clone()))
        if progress:
            bar = tqdm(total=self.nfe, desc="sampling", unit="eval", leave=False)
            calls.append(lambda _step: bool(bar.update()) or None)  # type: ignore[func-returns-value]
        x = noise.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.denoiser.dynamic_thresholding is not None:
            x = self._run_predictions(x, calls, cond)
        elif isinstance(self.policy, SolverTable):
            x = self._run_table(x, calls, cond)
        else:
            x = self._run_policy(x, calls, cond)
        if progress:
            bar.close()
        return (x, torch.stack(states)) if return_trajectory else x

    # -- static tables ------------------------------------------------------------------------

    def _plan(self, table: SolverTable, device: torch.device) -> Plan:
        times = table.times.detach()
        pre = self.denoiser.preconditioning(times, table.prediction)
        scale = table.initial_scale.detach()
        c_skip, a = pre.c_skip.clone(), table.a.detach().clone()
        c_skip[..., 0] *= scale
        a[..., 0] *= scale
        c_in_next = torch.cat([pre.c_in[..., 1:], torch.zeros_like(pre.c_in[..., :1])], -1)
        rows = layout.pack_rows(
            c_skip, pre.c_out, a, c_in_next, self._guidance(), table.b.detach(), dtype=self.dtype
        )
        c_noise = pre.c_noise
        if rows.ndim == 3:  # batched tables: [B, nfe, R] -> one block a row
            rows, c_noise = rows.transpose(0, 1).contiguous(), c_noise.transpose(0, 1).contiguous()
        return Plan(rows.to(device), c_noise.to(device), (pre.c_in[..., 0] * scale).to(device))

    def _guidance(self) -> float:
        scale = self.denoiser.guidance_scale
        return 1.0 if scale is None else float(scale)

    def _run_table(self, x: Tensor, calls: list[Callback], cond: dict[str, Any]) -> Tensor:
        assert isinstance(self.policy, SolverTable)
        plan = self._plans.get(x.device)
        if plan is None:
            plan = self._plans[x.device] = self._plan(self.policy, x.device)
        step = ops.select(self.backend, x.device)
        ring = x.new_empty((self.policy.depth, *x.shape))
        network_input = self._first_input(x, plan.c_in)
        for n in range(self.nfe):
            f, f_cond = self._evaluate(network_input, plan.c_noise[n], cond)
            step(f, f_cond, x, ring, plan.rows[n], network_input)
            for call in calls:
                call(Step(n, self.nfe, x))
        return x

    def _first_input(self, x: Tensor, c_in: Tensor) -> Tensor:
        dtype = self.denoiser.network_dtype or x.dtype
        return (per_sample(c_in, x) * x).to(dtype)

    def _evaluate(
        self, network_input: Tensor, c_noise: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        out = self.denoiser.network_output(network_input, c_noise, **cond)
        if isinstance(out, Tensor):
            return out.to(network_input.dtype).contiguous(), None
        dtype = network_input.dtype
        return out[0].to(dtype).contiguous(), out[1].to(dtype).contiguous()

    # -- policies -----------------------------------------------------------------------------

    def _start(self, x: Tensor) -> PolicyRun:
        if isinstance(self.policy, SolverTable):
            return TableRun(self.policy, x.device)
        return self.policy.start(x.shape[0], x.device)

    def _run_policy(self, x: Tensor, calls: list[Callback], cond: dict[str, Any]) -> Tensor:
        run = self._start(x)
        step = ops.select(self.backend, x.device)
        depth = int(self.policy.depth)
        ring = x.new_empty((depth, *x.shape))
        pre = self.denoiser.preconditioning(run.time, self.policy.prediction)
        scale = run.initial_scale
        network_input = self._first_input(x, pre.c_in * scale)
        for n in range(self.nfe):
            f, f_cond = self._evaluate(network_input, pre.c_noise, cond)
            features = self.denoiser.last_features if self.denoiser.features else None
            a, b, next_time = run.row(n, features)
            c_skip, c_out = pre.c_skip * scale, pre.c_out
            a = a * scale
            if next_time is not None:
                pre = self.denoiser.preconditioning(next_time, self.policy.prediction)
            row = layout.pack_row(
                c_skip, c_out, a, pre.c_in, self._guidance(), n % depth, b, dtype=self.dtype
            )
            step(f, f_cond, x, ring, row.contiguous(), network_input)
            scale = torch.ones_like(scale)
            for call in calls:
                call(Step(n, self.nfe, x))
        return x

    # -- runs that change the prediction (thresholding) -----------------------------------------

    def _run_predictions(self, x: Tensor, calls: list[Callback], cond: dict[str, Any]) -> Tensor:
        """Slow path: the prediction is formed, altered and only then handed to the row."""
        run = self._start(x)
        history: list[Tensor] = []
        time = run.time
        x = per_sample(run.initial_scale, x) * x
        for n in range(self.nfe):
            history.insert(0, self.denoiser.predict(x, time, self.policy.prediction, **cond))
            features = self.denoiser.last_features if self.denoiser.features else None
            a, b, next_time = run.row(n, features)
            x = per_sample(a, x) * x
            for k, m in enumerate(history[: b.shape[-1]]):
                x = x + per_sample(b[..., k], x) * m
            time = time if next_time is None else next_time
            for call in calls:
                call(Step(n, self.nfe, x))
        return x


def seeded_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    scale: float = 1.0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``scale * z`` with one generator per sample, so a sample does not depend on its batch.

    Args:
        seeds: one integer per sample.
        shape: shape of one sample, e.g. ``(3, 32, 32)``.
        scale: standard deviation, sigma_max for EDM.

    Returns:
        ``[len(seeds), *shape]``; drawn on the CPU in float32 so that every device agrees.
    """
    if not len(seeds):
        return torch.empty((0, *shape), dtype=dtype, device=device)
    draws = [torch.randn(*shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    return torch.stack(draws).to(dtype).mul_(scale).to(device)

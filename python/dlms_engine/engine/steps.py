"""The two halves of a sampling step, and the loops that alternate them.

``evaluate(n, network_input)`` calls the network, ``row(n)`` gives the numbers of the update. A table
knows all rows beforehand; a policy computes row n from evaluation n.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from ..models.denoiser import Denoiser
from ..ops import layout
from ..policies.corrector import Correctors
from ..solvers.policy import PolicyRun
from ..solvers.table import SolverTable
from ..support.forks import per_process
from . import cpu_loop

AfterRow = Callable[[int, Tensor], object]
NetworkOutput = Tensor | tuple[Tensor, Tensor]


class TableRows(NamedTuple):
    """A static table made ready for one device and one denoiser."""

    rows: Tensor  # [nfe, R] or [nfe, B, R], state dtype
    c_noise: Tensor  # [nfe] or [nfe, B], float32; float64 for a float64 network
    c_in: Tensor  # [] or [B], state dtype: scale of the first network input, initial_scale included


def plan_table(
    denoiser: Denoiser, table: SolverTable, dtype: torch.dtype, device: torch.device
) -> TableRows:
    """Rows of ``table`` with the denoiser's conversions and the initial scale folded in."""
    pre = denoiser.preconditioning(table.times.detach(), table.prediction)
    scale = table.initial_scale.detach()
    c_skip, a = pre.c_skip.clone(), table.a.detach().clone()
    c_skip[..., 0] *= scale
    a[..., 0] *= scale
    c_in_next = torch.cat([pre.c_in[..., 1:], torch.zeros_like(pre.c_in[..., :1])], -1)
    rows = layout.pack_rows(
        c_skip, pre.c_out, a, c_in_next, guidance(denoiser), table.b.detach(), dtype=dtype
    )
    # In the dtype in which the network gets them: a cast in the run is a kernel an evaluation.
    c_noise = pre.c_noise.to(level_dtype(denoiser, dtype))
    if rows.ndim == 3:  # batched tables: [B, nfe, R] -> one block a row
        rows, c_noise = rows.transpose(0, 1).contiguous(), c_noise.transpose(0, 1).contiguous()
    c_in = (pre.c_in[..., 0] * scale).to(dtype)
    return TableRows(rows.to(device), c_noise.to(device), c_in.to(device))


def level_dtype(denoiser: Denoiser, dtype: torch.dtype) -> torch.dtype:
    """In what ``Denoiser.network_output`` hands over noise levels, for a state of ``dtype``."""
    wide = (denoiser.network_dtype or dtype) == torch.float64
    return torch.float64 if wide else torch.float32


def guidance(denoiser: Denoiser) -> float:
    """The guidance column of every row."""
    return 1.0 if denoiser.guidance_scale is None else float(denoiser.guidance_scale)


def evaluate(
    denoiser: Denoiser, network_input: Tensor, c_noise: Tensor, conditions: dict[str, Any]
) -> NetworkOutput:
    """The network's output, both branches with guidance, contiguous and in its input's dtype."""
    dtype = network_input.dtype
    if denoiser.network_dtype == torch.float64:
        network_input = network_input.double()
    out = denoiser.network_output(network_input, c_noise, **conditions)
    if isinstance(out, Tensor):
        return out.to(dtype).contiguous()
    return out[0].to(dtype).contiguous(), out[1].to(dtype).contiguous()


class TableSteps:
    """Steps of a static table."""

    def __init__(
        self, denoiser: Denoiser, plan: TableRows, depth: int, conditions: dict[str, Any]
    ) -> None:
        self.rows: Tensor | None = plan.rows
        self.count = plan.rows.shape[0]
        self.depth = depth
        self.c_in = plan.c_in
        self._c_noise = plan.c_noise
        self._denoiser = denoiser
        self._conditions = conditions

    def evaluate(self, n: int, network_input: Tensor) -> NetworkOutput:
        return evaluate(self._denoiser, network_input, self._c_noise[n], self._conditions)

    def row(self, n: int) -> Tensor:
        assert self.rows is not None
        return self.rows[n]


class PolicySteps:
    """Steps of a policy: the row depends on the evaluation's features, the next time on the row."""

    rows: Tensor | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Any,
        run: PolicyRun,
        dtype: torch.dtype,
        conditions: dict[str, Any],
    ) -> None:
        self.count = int(policy.nfe)
        self.depth = int(policy.depth)
        self._denoiser = denoiser
        self._prediction = policy.prediction
        self._run = run
        self._dtype = dtype
        self._conditions = conditions
        self._pre = denoiser.preconditioning(run.time, policy.prediction)
        self._scale = run.initial_scale
        self.c_in = self._pre.c_in * run.initial_scale

    def evaluate(self, n: int, network_input: Tensor) -> NetworkOutput:
        return evaluate(self._denoiser, network_input, self._pre.c_noise, self._conditions)

    def row(self, n: int) -> Tensor:
        features = self._denoiser.last_features if self._denoiser.features else None
        a, b, next_time = self._run.row(n, features)
        c_skip, c_out = self._pre.c_skip, self._pre.c_out
        if n == 0:
            c_skip, a = c_skip * self._scale, a * self._scale
        if next_time is not None:
            self._pre = self._denoiser.preconditioning(next_time, self._prediction)
        weight, slot = guidance(self._denoiser), n % self.depth
        row = layout.pack_row(c_skip, c_out, a, self._pre.c_in, weight, slot, b, dtype=self._dtype)
        return row.contiguous()


class Steps(Protocol):
    """What a loop needs of a step."""

    rows: Tensor | None  # [count, R] or [count, B, R] where all are known beforehand
    count: int
    depth: int
    c_in: Tensor  # [] or [B]: scale of the first network input

    def evaluate(self, n: int, network_input: Tensor) -> NetworkOutput: ...

    def row(self, n: int) -> Tensor: ...


def first_input(x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
    """c_in * x in the network's dtype; the scale is rounded to the state's dtype first."""
    scale = c_in.to(device=x.device, dtype=x.dtype)
    scale = scale.reshape(-1, *([1] * (x.ndim - 1))) if scale.ndim else scale
    if dtype == x.dtype or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (scale * x).to(dtype)
    # The product is rounded once more as it is stored: one kernel in place of two.
    return torch.mul(scale, x, out=torch.empty_like(x, dtype=dtype))


def run_plain(
    steps: Steps,
    x: Tensor,
    network_dtype: torch.dtype,
    backend: ops.Backend,
    after: AfterRow | None,
    correctors: Correctors | None = None,
) -> Tensor:
    """The loop in Python; overwrites ``x``, and returns it where nothing corrects it."""
    ring = x.new_empty((steps.depth, *x.shape))
    network_input = first_input(x, steps.c_in, network_dtype)
    for n in range(steps.count):
        out = steps.evaluate(n, network_input)
        f, f_cond = (out, None) if isinstance(out, Tensor) else out
        row = steps.row(n)
        backend(f, f_cond, x, ring, row, network_input)
        changed = correctors is not None and n >= correctors.first
        if correctors is not None and changed:
            kept = range(min(n + 1, steps.depth))
            x = correctors(n, x, [ring[(n - k) % steps.depth] for k in kept])
        if after is not None:
            after(n, x)
        if after is not None or (changed and n + 1 < steps.count):
            # What was written into the state counts for the next evaluation.
            network_input.copy_(first_input(x, row[..., layout.C_IN], network_dtype))
    return x


class EnginePool:
    """Compiled loops that are free, by shape. One is taken out while it runs, so threads and nested
    runs never meet in one; copies of the pool start empty.
    """

    LARGEST = 4

    def __init__(self) -> None:
        self.renew()
        per_process(self)

    def renew(self) -> None:
        """Empty, with an unlocked lock."""
        self._free: OrderedDict[tuple[Any, ...], cpu_loop.Engine] = OrderedDict()
        self._lock = threading.Lock()

    def run(
        self, steps: Steps, x: Tensor, network_dtype: torch.dtype, after: AfterRow | None
    ) -> Tensor:
        """The loop in C++; overwrites ``x`` and returns it."""
        key = (tuple(x.shape), steps.depth, x.dtype, network_dtype)
        with self._lock:
            loop = self._free.pop(key, None)
        if loop is None:
            loop = cpu_loop.Engine(
                x.shape, steps.depth, state_dtype=x.dtype, network_dtype=network_dtype
            )
        rows: Tensor | int = steps.count if steps.rows is None else steps.rows
        row_fn = steps.row if steps.rows is None else None
        loop.run(
            x,
            rows,
            steps.evaluate,
            c_in=steps.c_in.to(x.dtype),
            row_fn=row_fn,
            callback=after,
            out=x,
        )
        with self._lock:
            self._free[key] = loop
            while len(self._free) > self.LARGEST:
                self._free.popitem(last=False)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

"""What a scheduler carries from step to step: state and history in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops import layout
from ...policies.corrector import Correctors
from .plan import StartRows

Clip = Callable[[Tensor], Tensor]
HALF = (torch.bfloat16, torch.float16)


class State:
    """State and history ring of one run of a plan.

    ``advance`` takes the pipeline's latents and gives the next ones. Wherever the pipeline hands back
    the numbers it was given, the float32 state behind them is used and no rounding accumulates; any
    other number (a callback's, an inpainting blend's) replaces the state, however it got there.

    Args:
        correctors: what follows the rows of a learned solver, if anything does.
    """

    def __init__(self, plan: StartRows, correctors: Correctors | None = None) -> None:
        self.plan = plan
        self._correctors = correctors
        self._x: Tensor | None = None
        self._ring: Tensor | None = None
        self._rows: list[Tensor] = []
        self._backend: ops.Backend | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the backend is chosen again where the copy runs
        return {**vars(self), "_backend": None}

    def advance(
        self,
        n: int,
        output: Tensor,
        sample: Tensor,
        row: Tensor | None = None,
        clip: Clip | None = None,
        keep_noise: bool = False,
    ) -> Tensor:
        """Row ``n`` (or ``row`` ``[B, 6 + depth]``): latents ``[B, ...]`` after it, new memory.

        ``clip`` changes the data prediction; with ``keep_noise`` the noise that goes with it stays
        that of the unclipped one, as in diffusers' DDIM.
        """
        x, ring, backend = self._ready(sample)
        row = self._rows[n] if row is None else row.to(x.dtype).contiguous()
        f = _network_dtype(output, sample, x.dtype)
        if clip is not None:
            f, row = self._clipped(n, f, x, row, clip, keep_noise)
        if torch.is_grad_enabled() and (f.requires_grad or x.requires_grad):
            return self._differentiable(f, x, ring, row, n).to(sample.dtype)
        latents = torch.empty_like(f)
        backend(f, None, x, ring, row, latents)
        if self._correctors is not None and n >= self._correctors.first:
            latents = self._corrected(n, x, list(ring.unbind(0)))
            x.copy_(latents)
        return latents.to(sample.dtype)

    # -- the state -------------------------------------------------------------------------------

    def fits(self, sample: Tensor) -> bool:
        """Whether the history, if there is one, is of latents like ``sample``."""
        x = self._x
        return x is None or (x.shape == sample.shape and x.device == sample.device)

    def _ready(self, sample: Tensor) -> tuple[Tensor, Tensor, ops.Backend]:
        x, ring, backend = self._x, self._ring, self._backend
        if x is None or ring is None:
            return self._begin(sample)
        if backend is None:
            self._backend = backend = ops.select("auto", x.device)
        if _tracked(x, sample):
            self._x = x = sample.to(x.dtype)
        elif sample.dtype == x.dtype:
            x.copy_(sample)
        else:
            x.copy_(torch.where(sample == x.to(sample.dtype), x, sample.to(x.dtype)))
        return x, ring, backend

    def _begin(self, sample: Tensor) -> tuple[Tensor, Tensor, ops.Backend]:
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = sample.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        if self._correctors is not None:
            self._correctors.to(x.device)
        ring = torch.empty((self.plan.depth, *x.shape), dtype=dtype, device=x.device)
        backend = ops.select("auto", x.device)
        self._rows = list(self.plan.packed.to(device=x.device, dtype=dtype).unbind(0))
        self._x, self._ring, self._backend = x, ring, backend
        return x, ring, backend

    # -- slower ways through a row ---------------------------------------------------------------

    def _differentiable(self, f: Tensor, x: Tensor, ring: Tensor, row: Tensor, n: int) -> Tensor:
        """The functional row, for those who differentiate through the pipeline."""
        x_next, m, _ = ops.fused_row(f, None, x, ring, row)
        slots = list(ring.unbind(0))
        slots[n % self.plan.depth] = m
        if self._correctors is not None:
            x_next = self._corrected(n, x_next, slots)
        self._x, self._ring = x_next, torch.stack(slots)
        return x_next

    def _corrected(self, n: int, x: Tensor, slots: list[Tensor]) -> Tensor:
        """The state after row ``n`` with its corrector's residual; outputs come newest first."""
        assert self._correctors is not None
        kept = range(min(n + 1, self.plan.depth))
        return self._correctors(n, x, [slots[(n - k) % self.plan.depth] for k in kept])

    def _clipped(
        self, n: int, f: Tensor, x: Tensor, row: Tensor, clip: Clip, keep_noise: bool
    ) -> tuple[Tensor, Tensor]:
        """The row with its m formed here, from the clipped data prediction."""
        plan = self.plan
        scale = plan.scale if n == 0 else 1.0  # the row's first columns hold it already
        m = row[..., 0] * x + row[..., 1] * f.to(x.dtype)
        if plan.prediction == "data" and keep_noise:
            # x' = alpha' clip(m) + sigma' (x - alpha m) / sigma, written as a x + b m'
            a, b = float(plan.packed[n, layout.A]) / scale, float(plan.packed[n, layout.B])
            kept = float(plan.alpha[n]) * a
            m = (clip(m) * (b + kept) - m * kept) / b
        elif plan.prediction == "data":
            m = clip(m)
        else:
            alpha, sigma, state = float(plan.alpha[n]), float(plan.sigma[n]), scale * x
            m = (state - alpha * clip((state - sigma * m) / alpha)) / sigma
        row = row.clone()
        row[..., 0], row[..., 1] = 0.0, 1.0
        return m, row


def _network_dtype(output: Tensor, sample: Tensor, state: torch.dtype) -> Tensor:
    """``output`` in a dtype the fused row takes and the latents can be returned in."""
    if state == torch.float64 or sample.dtype not in HALF:
        return output.to(state).contiguous()
    return (
        output.contiguous()
        if output.dtype == torch.float32
        else output.to(sample.dtype).contiguous()
    )


def _tracked(x: Tensor, sample: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or sample.requires_grad)

"""What a scheduler carries from step to step: state and history in float32."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from .plan import Plan

Clip = Callable[[Tensor], Tensor]
HALF = (torch.bfloat16, torch.float16)


class State:
    """State and history ring of one run of a plan.

    ``advance`` takes the pipeline's latents and gives the next ones. While the pipeline hands back
    the very tensor it was given, untouched, the float32 state behind it is used and no rounding
    accumulates; any other tensor (a callback's, an inpainting blend) replaces the state.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._x: Tensor | None = None
        self._ring: Tensor | None = None
        self._rows: list[Tensor] = []
        self._backend: ops.Backend | None = None
        self._given: weakref.ReferenceType[Tensor] | None = None
        self._version = -1

    def advance(
        self,
        n: int,
        output: Tensor,
        sample: Tensor,
        row: Tensor | None = None,
        clip: Clip | None = None,
    ) -> Tensor:
        """Row ``n`` (or ``row`` ``[B, 6 + depth]``): latents ``[B, ...]`` after it, new memory."""
        x, ring, backend = self._ready(sample)
        row = self._rows[n] if row is None else row.to(x.dtype).contiguous()
        f = _network_dtype(output, sample, x.dtype)
        if torch.is_grad_enabled() and (f.requires_grad or x.requires_grad):
            return self._remember(self._differentiable(f, x, ring, row, n), sample.dtype)
        if clip is not None:
            f, row = self._clipped(n, f, x, row, clip)
        latents = torch.empty_like(f)
        backend(f, None, x, ring, row, latents)
        return self._remember(latents, sample.dtype)

    # -- the state -------------------------------------------------------------------------------

    def _ready(self, sample: Tensor) -> tuple[Tensor, Tensor, ops.Backend]:
        x, ring, backend = self._x, self._ring, self._backend
        fits = x is not None and x.shape == sample.shape and x.device == sample.device
        if x is None or ring is None or backend is None or not fits:
            return self._begin(sample)
        if not self._is_ours(sample):
            self._x = x = x.copy_(sample) if not _tracked(x, sample) else sample.to(x.dtype)
        return x, ring, backend

    def _begin(self, sample: Tensor) -> tuple[Tensor, Tensor, ops.Backend]:
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = sample.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        ring = torch.empty((self.plan.depth, *x.shape), dtype=dtype, device=x.device)
        backend = ops.select("auto", x.device)
        self._rows = list(self.plan.packed.to(device=x.device, dtype=dtype).unbind(0))
        self._x, self._ring, self._backend = x, ring, backend
        return x, ring, backend

    def _is_ours(self, sample: Tensor) -> bool:
        if self._given is None or self._given() is not sample:
            return False
        # inference tensors do not count their changes: they are read again, at the pipeline's dtype
        return not sample.is_inference() and sample._version == self._version

    def _remember(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        latents = latents.to(dtype)
        self._given = weakref.ref(latents)
        self._version = -1 if latents.is_inference() else latents._version
        return latents

    # -- slower ways through a row ---------------------------------------------------------------

    def _differentiable(self, f: Tensor, x: Tensor, ring: Tensor, row: Tensor, n: int) -> Tensor:
        """The functional row, for those who differentiate through the pipeline."""
        x_next, m, _ = ops.fused_row(f, None, x, ring, row)
        slots = list(ring.unbind(0))
        slots[n % self.plan.depth] = m
        self._x, self._ring = x_next, torch.stack(slots)
        return x_next

    def _clipped(
        self, n: int, f: Tensor, x: Tensor, row: Tensor, clip: Clip
    ) -> tuple[Tensor, Tensor]:
        """The row with its m formed here, from the clipped data prediction."""
        plan = self.plan
        m = row[..., 0] * x + row[..., 1] * f.to(x.dtype)
        if plan.prediction == "data":
            m = clip(m)
        else:
            alpha, sigma = float(plan.alpha[n]), float(plan.sigma[n])
            m = (x - alpha * clip((x - sigma * m) / alpha)) / sigma
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

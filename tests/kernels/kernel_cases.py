"""Inputs, tolerance and comparisons shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlms_engine.ops import layout, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass(frozen=True)
class Case:
    """Arguments of `fused_row`, and one upstream gradient per output."""

    f: Tensor
    f_cond: Tensor | None
    x: Tensor
    ring: Tensor
    row: Tensor
    grads: tuple[Tensor, Tensor, Tensor]

    def forward(self) -> tuple[Any, ...]:
        """Arguments of the functional and, without network_input, of the in-place op."""
        return self.f, self.f_cond, self.x, self.ring, self.row

    def backward(self) -> tuple[Any, ...]:
        """Arguments of the backward op."""
        return (*self.grads, *self.forward())

    def to(self, device: str) -> Case:
        """The same case on a device."""
        return self.map(lambda t: t.to(device))

    def double(self) -> Case:
        """The same numbers, exactly, in float64."""
        return self.map(lambda t: t.double())

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor changed."""
        return Case(
            change(self.f),
            None if self.f_cond is None else change(self.f_cond),
            change(self.x),
            change(self.ring),
            change(self.row),
            tuple(change(g) for g in self.grads),  # type: ignore[arg-type]
        )

    def sample(self, i: int) -> Case:
        """Sample i alone, in memory of its own."""
        part = self.map(lambda t: t[i : i + 1].clone())
        row = self.row if self.row.dim() == 1 else self.row[i : i + 1].clone()
        return replace(part, ring=self.ring[:, i : i + 1].clone(), row=row)


def make_case(
    shape: tuple[int, ...],
    depth: int,
    dtype: torch.dtype = torch.float32,
    *,
    per_sample: bool = False,
    guided: bool = False,
    seed: int = 0,
) -> Case:
    """A random case; the state is float64 for a float64 network, else float32."""
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    row = draw(*((shape[0],) if per_sample else ()), layout.row_width(depth)).to(state)
    slots = torch.arange(shape[0]) if per_sample else torch.tensor(depth - 1)
    row[..., layout.SLOT] = (slots % depth).to(state)
    return Case(
        f=draw(*shape).to(dtype),
        f_cond=draw(*shape).to(dtype) if guided else None,
        x=draw(*shape).to(state),
        ring=draw(depth, *shape).to(state),
        row=row,
        grads=(draw(*shape).to(state), draw(*shape).to(state), draw(*shape).to(dtype)),
    )


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...], what: str = "") -> None:
    """Every tensor equal bit for bit (NaN is never equal)."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == w.dtype and g.shape == w.shape, f"{what} output {i}: {g.dtype} {g.shape}"
        if not torch.equal(g.cpu(), w.cpu()):
            off = (g.cpu().double() - w.cpu().double()).abs().max().item()
            raise AssertionError(f"{what} output {i} differs by up to {off:.3e}")


def assert_no_worse_than_eager(got: Tensor, eager: Tensor, truth: Tensor, slack: float = 2) -> None:
    """Error against float64 at most `slack` times the eager reference's, or one rounding of it."""
    assert got.shape == truth.shape and got.isfinite().all()
    if got.numel() == 0:
        return
    yard = (eager.double() - truth).abs().max().item()
    ulp = torch.finfo(got.dtype).eps * truth.abs().max().item()
    error = (got.cpu().double() - truth).abs().max().item()
    assert error <= slack * max(yard, ulp), f"{error:.3e} > {slack} x max({yard:.3e}, {ulp:.3e})"


def truth_of(case: Case) -> tuple[Tensor, ...]:
    """The forward in float64 on the same numbers; nothing is rounded to the network's dtype."""
    return reference.fused_row(*case.double().forward())

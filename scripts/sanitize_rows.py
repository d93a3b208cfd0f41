#!/usr/bin/env python3
"""Runs every CUDA kernel once on small shapes, for compute-sanitizer (see scripts/gpu_check.sh).

Each launch is compared with the eager reference, so that a run under a tool also checks results.
"""

from __future__ import annotations

import torch

from dlms_engine import ops
from dlms_engine.ops import layout, reference

# A full and a ragged block, aligned and not, one sample and several; every depth kernel that is
# compiled beforehand, and of Triton's, which are compiled here, one with a row for each sample.
SHAPES = ((2, 4, 8, 8), (3, 3, 5, 7), (1, 2051))
DEPTHS = {"cuda": (1, 2, 3, 4, 6), "triton": (2, 3)}
DTYPES = (torch.float32, torch.bfloat16)


def inputs(shape: tuple[int, ...], depth: int, dtype: torch.dtype, each: bool) -> tuple:
    """Arguments of `fused_row` on the GPU; everything that a kernel may read is written."""
    row = torch.randn(*((shape[0],) if each else ()), layout.row_width(depth))
    row[..., layout.SLOT] = depth - 1
    x, f, f_cond = (torch.randn(shape) for _ in range(3))
    tensors = (f.to(dtype), f_cond.to(dtype), x, torch.randn(depth, *shape), row)
    return tuple(t.cuda() for t in tensors)


def check(name: str) -> int:
    """Launches of one backend; RuntimeError if a result is wrong."""
    backend = ops.select(name, "cuda")
    launches = 0
    for shape in SHAPES:
        for depth in DEPTHS[name]:
            for dtype in DTYPES:
                given = inputs(shape, depth, dtype, each=depth % 2 == 0)
                on_cpu = [t.cpu() for t in given]
                want = reference.fused_row(*on_cpu)
                grads = [torch.randn_like(t) for t in want]
                got = backend.fused_row(*given)
                got += backend.fused_row_backward(*(g.cuda() for g in grads), *given)[:4]
                want += reference.fused_row_backward(*grads, *on_cpu)[:4]
                backend.fused_row_(*given, torch.empty_like(given[0]))
                for i, (g, w) in enumerate(zip((*got, given[2]), (*want, want[0]), strict=True)):
                    if not torch.equal(g.cpu(), w):
                        raise RuntimeError(f"{name} {shape} depth {depth} {dtype}: output {i}")
                launches += 3
    return launches


def main() -> None:
    """Every compiled backend of this machine."""
    torch.manual_seed(0)
    for name in ("cuda", "triton"):
        print(f"{name}: {check(name)} calls, all as the reference")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Runs every CUDA kernel once on small shapes, for compute-sanitizer (see scripts/gpu_check.py).

Each launch is compared with the eager reference, so that a run under a tool also checks results.
`--device cpu` launches the CPU's kernels instead: a rehearsal.
"""

from __future__ import annotations

import argparse

import torch

from dlms_engine import ops
from dlms_engine.ops import layout, reference

# A full and a ragged block, aligned and not, one sample and several; every depth kernel that is
# compiled beforehand, and of Triton's, which are compiled here, one with a row for each sample.
SHAPES = ((2, 4, 8, 8), (3, 3, 5, 7), (1, 2051))
DEPTHS = {"cuda": (1, 2, 3, 4, 6), "triton": (2, 3), "cpu": (1, 2)}
DTYPES = (torch.float32, torch.bfloat16)


def inputs(
    device: str, shape: tuple[int, ...], depth: int, dtype: torch.dtype, each: bool
) -> tuple[torch.Tensor, ...]:
    """Arguments of `fused_row` on the device; everything that a kernel may read is written."""
    row = torch.randn(*((shape[0],) if each else ()), layout.row_width(depth))
    row[..., layout.SLOT] = depth - 1
    x, f, f_cond = (torch.randn(shape) for _ in range(3))
    tensors = (f.to(dtype), f_cond.to(dtype), x, torch.randn(depth, *shape), row)
    return tuple(t.to(device, copy=True) for t in tensors)


def check(name: str, device: str) -> int:
    """Launches of one backend; RuntimeError if a result is wrong."""
    backend = ops.select(name, device)
    launches = 0
    for shape in SHAPES:
        for depth in DEPTHS[name]:
            for dtype in DTYPES:
                there = inputs(device, shape, depth, dtype, each=depth % 2 == 0)
                here = [t.to("cpu", copy=True) for t in there]
                want = reference.fused_row(*here)
                grads = [torch.randn_like(t) for t in want]
                got = backend.fused_row(*there)
                got += backend.fused_row_backward(*(g.to(device) for g in grads), *there)[:4]
                want += reference.fused_row_backward(*grads, *here)[:4]
                backend.fused_row_(*there, torch.empty_like(there[0]))
                for i, (g, w) in enumerate(zip((*got, there[2]), (*want, want[0]), strict=True)):
                    if not torch.equal(g.cpu(), w):
                        raise RuntimeError(f"{name} {shape} depth {depth} {dtype}: output {i}")
                launches += 3
    return launches


def main() -> None:
    """Every compiled backend of this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for name in ("cuda", "triton") if device == "cuda" else ("cpu",):
        print(f"{name}: {check(name, device)} calls, all as the reference")


if __name__ == "__main__":
    main()

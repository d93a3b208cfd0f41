"""Name the dtype a benchmark model is measured in on a GPU.

    python examples/choose_precision.py cifar10-32

Prints float16 where it answers all noise levels finitely and closer to float32 than bfloat16 does
(its mantissa has three bits more, its range far less), else bfloat16; float32 without a GPU. The
errors go to stderr.
"""

from __future__ import annotations

import math
import sys

import torch

from dlms_engine.lab import benchmark_model

LEVELS = (80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.002)


@torch.no_grad()
def errors(name: str, device: str, count: int = 64) -> dict[str, float]:
    """dtype -> RMS difference of the network's answers to float32's, the largest of all levels."""
    unets = {
        dtype: benchmark_model.load_unet(name, device, benchmark_model.DTYPES[dtype])
        for dtype in benchmark_model.DTYPES
    }
    size = unets["float32"].size
    generator = torch.Generator().manual_seed(0)
    # Unit variance at every level, as preconditioning gives it.
    x = torch.randn(count, 3, size, size, generator=generator).to(device)
    found = dict.fromkeys(("float16", "bfloat16"), 0.0)
    for sigma in LEVELS:
        time = torch.full((count,), math.log(sigma) / 4, device=device)
        wide = unets["float32"](x, time)
        for dtype in found:
            half = unets[dtype](x.to(benchmark_model.DTYPES[dtype]), time).float()
            off = float((half - wide).square().mean().sqrt())
            found[dtype] = max(found[dtype], off if math.isfinite(off) else math.inf)
    return found


def choose(found: dict[str, float]) -> str:
    return "float16" if found["float16"] <= found["bfloat16"] < math.inf else "bfloat16"


if __name__ == "__main__":
    if torch.cuda.is_available():
        measured = errors(sys.argv[1], "cuda")
        print(f"largest RMS error by dtype: {measured}", file=sys.stderr)
        print(choose(measured))
    else:
        print("float32")

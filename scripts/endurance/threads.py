"""One sampler for several threads and shapes: every call gives its own bits, and memory stays."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch


def threads(count: int) -> dict[str, Any]:
    import cli_model

    from dlms_engine import Sampler, grids, solvers

    torch.set_num_threads(1)
    held = cli_model.tiny()
    process = held.denoiser.process
    tables = [solvers.ipndm(process, grids.polynomial(process, n)) for n in (3, 4, 5)]
    samplers = [Sampler(held.denoiser, table) for table in tables]
    shapes = [(3, 8, 8), (3, 6, 10), (3, 5, 5), (3, 12, 4), (3, 9, 7), (3, 4, 16)]
    cases = [(s, b, shape) for s in range(3) for b in (1, 2, 3, 5) for shape in shapes]

    def run(case: tuple[int, int, tuple[int, ...]]) -> torch.Tensor:
        which, batch, shape = case
        out: torch.Tensor = samplers[which].sample(range(batch), shape)
        return out

    expected = {case: run(case) for case in cases}
    different, lock, left = Counter[str](), threading.Lock(), iter(range(count))
    sizes: list[int] = []
    every = max(1, count // 20)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            if number % every == 0:
                sizes.append(resident())
            case = rng.choice(cases)
            if not torch.equal(run(case), expected[case]):
                different[str(case)] += 1

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    early, late = sizes[len(sizes) // 4], sizes[-1]
    return {
        "calls": count,
        "threads": 4,
        "shapes": len(cases),
        "seconds": round(time.monotonic() - started, 1),
        "different": sum(different.values()),
        "MiB at a quarter and at the end": [early >> 20, late >> 20],
        "grew": late - early > 16 << 20,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

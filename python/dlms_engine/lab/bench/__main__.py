"""`python -m dlms_engine.lab.bench step [options]`."""

from __future__ import annotations

import sys
from enum import Enum


class What(str, Enum):
    """Benchmarks there are."""

    step = "step"
    loop = "loop"
    device = "device"
    pipeline = "pipeline"
    distill = "distill"
    allocator = "allocator"


def benchmark(what: What, arguments: list[str]) -> int:
    """Runs the benchmark ``what``; returns its exit status. Others are not imported."""
    if what is What.step:
        from . import step

        return step.bench_step(arguments)
    if what is What.loop:
        from . import loop

        return loop.bench_loop(arguments)
    if what is What.device:
        from . import device

        return device.bench_device(arguments)
    if what is What.pipeline:
        from . import pipeline

        return pipeline.bench_pipeline(arguments)
    if what is What.allocator:
        from . import allocator

        return allocator.bench_allocator(arguments)
    from . import distill

    return distill.bench_distill(arguments)


def main_bench(arguments: list[str]) -> int:
    """Runs the benchmark named first with the arguments that follow; returns its exit status."""
    names = [what.value for what in What]
    if not arguments or arguments[0] not in names:
        print(
            f"usage: python -m dlms_engine.lab.bench {{{','.join(names)}}} [options]",
            file=sys.stderr,
        )
        return 2
    return benchmark(What(arguments[0]), arguments[1:])


if __name__ == "__main__":
    sys.exit(main_bench(sys.argv[1:]))

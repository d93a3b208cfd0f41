"""`python -m dlms_engine.lab.bench step [options]`."""

from __future__ import annotations

import importlib
import sys

WHAT = ("step", "loop", "device", "pipeline", "distill")


def main(arguments: list[str]) -> int:
    """Runs the benchmark named first with the arguments that follow; returns its exit status."""
    if not arguments or arguments[0] not in WHAT:
        print(
            f"usage: python -m dlms_engine.lab.bench {{{','.join(WHAT)}}} [options]",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(f"dlms_engine.lab.bench.{arguments[0]}")
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

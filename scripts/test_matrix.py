"""Runs the whole test suite, slow tests included, on several versions of Python and torch.

    python scripts/test_matrix.py                          # one environment a line of PAIRS
    python scripts/test_matrix.py --python 3.13 --torch newest
    python scripts/test_matrix.py --plan                   # what would be run

Each pair gets an environment of its own in ``.matrix/`` (kept for the next call), made by
scripts/bootstrap.sh. Interpreters that are not on the PATH are named and count as failures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = {"2.11": "torch==2.11.*", "2.13": "torch==2.13.*", "newest": "torch"}
PAIRS = (("3.10", "2.11"), ("3.11", "2.13"), ("3.12", "newest"), ("3.13", "2.13"))
"""Every Python and every torch at least once."""


@dataclass(frozen=True)
class Run:
    """One environment and the commands that make and test it."""

    python: str
    torch: str

    @property
    def folder(self) -> Path:
        return ROOT / ".matrix" / f"py{self.python}-torch{self.torch}"

    @property
    def interpreter(self) -> str:
        return f"python{self.python}"

    def commands(self, arguments: Sequence[str]) -> list[list[str]]:
        return [
            [str(ROOT / "scripts" / "bootstrap.sh"), str(self.folder), "dev"],
            [
                str(self.folder / "bin" / "python"),
                "-m",
                "pytest",
                "-m",
                "slow or not slow",
                *("-n", "auto", "--dist", "loadfile"),
                *arguments,
            ],
        ]

    def environment(self, index: str | None) -> dict[str, str]:
        torch = TORCHES[self.torch] + (f" --index-url {index}" if index else "")
        # a process a core, as in the Makefile: one thread each
        one = {"OMP_NUM_THREADS": "1"}
        return {**os.environ, **one, "PYTHON": self.interpreter, "TORCH": torch}


def chosen(pythons: Sequence[str] | None, torches: Sequence[str] | None) -> list[Run]:
    """All pairs of what is named; PAIRS where nothing is."""
    if not pythons and not torches:
        return [Run(*pair) for pair in PAIRS]
    return [Run(p, t) for p in pythons or PYTHONS for t in torches or TORCHES]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", choices=PYTHONS)
    parser.add_argument("--torch", action="append", choices=list(TORCHES))
    parser.add_argument("--index-url", help="of torch alone, e.g. PyTorch's CPU index")
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    parser.add_argument("arguments", nargs="*", help="handed to pytest, after --")
    options = parser.parse_args(argv)
    results: dict[Run, str] = {}
    for run in chosen(options.python, options.torch):
        commands = run.commands(options.arguments)
        if options.plan:
            print(f"Python {run.python}, {TORCHES[run.torch]}:")
            print("\n".join("  " + " ".join(command) for command in commands))
            continue
        results[run] = outcome(run, commands, options.index_url)
        print(f"Python {run.python}, torch {run.torch}: {results[run]}", flush=True)
    return int(any(result != "passed" for result in results.values()))


def outcome(run: Run, commands: list[list[str]], index: str | None) -> str:
    """ "passed", or the step that failed."""
    if shutil.which(run.interpreter) is None:
        return f"no {run.interpreter} on the PATH"
    for name, command in zip(("installation", "tests"), commands, strict=True):
        if subprocess.run(command, cwd=ROOT, env=run.environment(index), check=False).returncode:
            return f"{name} failed"
    return "passed"


if __name__ == "__main__":
    sys.exit(main())

"""Checks that are run one by one, each on its own, with a JSON file that is whole after each.

A check is a function that returns its figures, a dict for JSON, or raises. What it raises is noted
with its traceback in the log, and the next check runs. `Absent` says that a check needs what is not
there; that is neither a pass nor a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "tests" / "kernels", ROOT / "tests"):  # their cases serve here too
    sys.path.append(str(folder))


class Absent(Exception):
    """What a check needs is not there; the message says what."""


class Checks:
    """Runs checks and writes what came of them.

    Args:
        title: of the report, e.g. "rows".
        output: the JSON file, rewritten after each check; None writes none.
        seconds: no check is started after so many seconds; it is reported as not reached.
        facts: what every figure has to be quoted with, copied into the report.
    """

    def __init__(self, title: str, output: Path | None, seconds: float, **facts: Any) -> None:
        self._output = output
        self._end = time.monotonic() + seconds
        self.report: dict[str, Any] = {"stage": title, **facts, "checks": []}
        self._write()

    def run(self, name: str, check: Callable[[], dict[str, Any] | None]) -> bool:
        """Runs one check; whether it passed."""
        entry: dict[str, Any] = {"check": name, "status": "not reached", "seconds": 0.0}
        start = time.monotonic()
        if start < self._end:
            try:
                entry |= {"status": "passed", "figures": check() or {}}
            except Absent as reason:
                entry |= {"status": "absent", "reason": str(reason)}
            except Exception as error:  # whatever it is, the next check is to run
                traceback.print_exc()
                entry |= {"status": "failed", "reason": first_line(error)}
            entry["seconds"] = round(time.monotonic() - start, 3)
        self.report["checks"].append(entry)
        self._write()
        print(one_line(entry), flush=True)
        return entry["status"] == "passed"

    def status(self) -> int:
        """1 if a check failed or none passed, else 0."""
        states = [entry["status"] for entry in self.report["checks"]]
        return int("failed" in states or "passed" not in states)

    def _write(self) -> None:
        if self._output is not None:
            write_json(self._output, self.report)


def write_json(path: Path, report: Any) -> None:
    """The file is the old one or the new one, whenever the process ends."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def first_line(error: BaseException) -> str:
    """Type and first line of the message, shortened."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def one_line(entry: dict[str, Any]) -> str:
    """A check for the log."""
    said = entry.get("reason") or ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in entry.get("figures", {}).items()
        if not isinstance(v, (dict, list))
    )
    return f"{entry['status']:<12}{entry['seconds']:7.2f} s  {entry['check']}  {said}"


def options(description: str) -> argparse.ArgumentParser:
    """The arguments that every stage has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", help="cpu in a rehearsal")
    parser.add_argument("--output", type=Path, help="JSON, rewritten after each check")
    parser.add_argument("--seconds", type=float, default=40.0, help="no check starts later")
    return parser


def synchronize(device: str) -> None:
    """Waits until the device is done."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()

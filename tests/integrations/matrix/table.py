"""docs/integrations/pipelines.md: the matrix as a table, written by running this file."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from cells import CASES, Row, row  # noqa: E402

PAGE = HERE.parents[2] / "docs" / "integrations" / "pipelines.md"
HEAD = """# Pipelines

Every pipeline below is built from small random components and run three ways on the CPU: with its own
scheduler, with `DLMSScheduler` step by step, and accelerated (`unipc`, 4 steps, three calls in a row).
`tests/integrations/matrix/table.py` writes this page; the test beside it holds every row to it.

- **own solver**: `DLMSScheduler` with the solver of the pipeline's own scheduler against that scheduler,
  largest difference relative to the largest value. A dash: the engine has no such solver. Multistep flow
  schedulers of diffusers cut the times they pass to the network to integers; here the fraction is kept.
- **accelerated**: the worst of the three calls against step by step.
- **loop**: whether the engine runs the loop from the second call on, or why it stays step by step.
  Where the pipeline's own scheduler runs, `DLMSScheduler` alone refuses with the same words.

| pipeline | own scheduler | own solver | calls a step | accelerated | loop |
|---|---|---|---|---|---|
"""


def line(r: Row) -> str:
    same = "-" if r.same is None else f"{r.same:.0e}"
    reason = r.reason.replace("ValueError: ", "")
    for mark in ";:":
        reason = reason.removesuffix(f"{mark} keep the pipeline's own scheduler")
    loop = "whole" if r.whole_loop else f"step by step: {reason}"
    calls = ", ".join(map(str, sorted(set(r.calls)))) or "-"
    scheduler = r.original.removesuffix("Scheduler")
    return f"| {r.name} | {scheduler} | {same} | {calls} | {r.accelerated:.0e} | {loop} |\n"


def verdicts(page: str) -> dict[str, bool]:
    """Pipeline -> whether the page says its loop runs whole."""
    rows = [r.split("|") for r in page.splitlines() if r.startswith("| ") and "---" not in r]
    return {cells[1].strip(): cells[6].strip() == "whole" for cells in rows[1:]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(HEAD + "".join(line(row(name)) for name in CASES))

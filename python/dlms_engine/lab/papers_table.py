r"""The papers' learners on EDM, VP, cosine and flow models: what they start from, and what they reach.

    python -m dlms_engine.lab.papers_table --output benchmarks/results/papers.json --page docs/papers.md

Small exact networks (``lab.mixture``), so that a cell takes seconds. Each is run with the settings of
its paper, once as the published algorithm leaves it on that process and once as ``distill`` returns it,
and measured with its base on samples that nothing was trained or chosen on. Cells that ``--output`` holds
are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.sampler import Sampler
from ..learners import LEARNERS, distill
from ..learners.dlms.objective import Dlms
from ..learners.dode.objective import standard_bases
from ..learners.gits.choice import standard_students
from ..learners.registry import preset
from ..learners.start import ExactSolution, SamplingProblem
from ..learners.start.nearer import nearer
from ..processes import EDM, Process
from ..solvers.policy import Policy
from ..solvers.table import SolverTable
from ..support.files import require_writable, write_text
from .mixture import MIXTURE_SHAPE, MIXTURES, mixture_model

_COMMAND = (
    "python -m dlms_engine.lab.papers_table "
    "--output benchmarks/results/papers.json --page docs/papers.md"
)
_NFE = 5
"""Evaluations, also those of kept cells that do not say."""
_FIRST = 1 << 24
"""Number of the first measured sample."""


@dataclasses.dataclass(frozen=True)
class PaperEntry:
    """One line of the table.

    Attributes:
        settings: of ``distill``, its method among them.
        published: what differs where the published algorithm is left to itself.
    """

    name: str
    settings: Mapping[str, Any]
    published: Mapping[str, Any]


def _amed(name: str, preset_name: str, **changes: Any) -> PaperEntry:
    settings = {**preset(preset_name), "keep": "best", "trajectories": 1_600, **changes}
    return PaperEntry(name, settings, {"keep": "learned", "coordinates": "process"})


_PROCESS = {"coordinates": "process"}
_LEARNED = {"keep": "learned"}
_SEARCHED = {"candidates": "searched"}
_TIMES = {"lr_times_share": 0.1, "rounds_times": 5, "keep": "learned"}
_LITERAL = {**preset("dlms-cifar10"), "last_step": "pixels", "trajectories": 1_600,
            "ema_kimg": (0.25, 0.5)}  # fmt: skip
_LD3 = {"method": "ld3", "loss": "l2", "batch": 10, "order": 3, "train": 20, "validation": 20}
_ABLATED = {**_LD3, "student": "unipc", "keep": "learned"}
_GITS = {**preset("gits-cifar10"), "candidates": "all"}
_ENTRIES = (
    PaperEntry("DLMS, the paper's algorithm", _LITERAL, _PROCESS),
    PaperEntry("DLMS", {"method": "dlms", "trajectories": 1_600}, _PROCESS),
    _amed("AMED-Solver", "amed-cifar10"),
    _amed("AMED-Plugin on iPNDM", "amed-plugin-cifar10"),
    _amed(
        "AMED-Plugin on DPM-Solver++", "amed-plugin-cifar10", solver="dpm_solver_pp", order=3,
        grid="logsnr",
    ),
    PaperEntry("LD3, UniPC", {**_LD3, "student": "unipc"}, _TIMES),
    PaperEntry("LD3, iPNDM", {**_LD3, "student": "ipndm"}, _TIMES),
    PaperEntry("LD3, UniPC, hard targets", {**_ABLATED, "radius": 0.0}, {}),
    PaperEntry("LD3, UniPC, no network times", {**_ABLATED, "decouple": False}, {}),
    PaperEntry("LD3, UniPC, neither", {**_ABLATED, "decouple": False, "radius": 0.0}, {}),
    PaperEntry("D-ODE, DDIM", {"method": "dode", "solver": "ddim"}, _LEARNED),
    PaperEntry("D-ODE, iPNDM", {"method": "dode", "solver": "ipndm"}, _LEARNED),
    PaperEntry("GITS, DDIM", {**_GITS, "solver": "ddim", "order": None}, _SEARCHED),
    PaperEntry("GITS, iPNDM", _GITS, _SEARCHED),
    PaperEntry("free table", {"method": "free_table", "trajectories": 1_600, "base": "ipndm"}, {}),
)  # fmt: skip


def _bases(method: str, settings: Any, process: Process) -> dict[str, SolverTable]:
    """The handcrafted solvers that an entry improves, by grid."""
    made: dict[str, Callable[[], dict[str, SolverTable]]] = {
        "amed": lambda: settings.handcrafted(process),
        "dode": lambda: standard_bases(process, settings),
        "gits": lambda: standard_students(process, settings),
        "ld3": lambda: settings.base.standard(process, settings.nfe),
        "free_table": lambda: settings.solver.standard(process, settings.nfe),
    }
    return made[method]()


class MeasuredMixture:
    """One model with its exact solution on the measured samples."""

    def __init__(self, name: str, samples: int) -> None:
        self.denoiser = mixture_model(MIXTURES[name])
        self._problem = SamplingProblem(self.denoiser, MIXTURE_SHAPE)
        self._numbers = range(_FIRST, _FIRST + samples)
        exact = ExactSolution(self._problem)
        self.proof = exact.prove(0.02)
        self._target = exact.solve(self._numbers)

    def squares(self, policy: Policy) -> Tensor:
        """Squared errors ``[B]`` of the ends of the measured samples."""
        with torch.no_grad():
            end = Sampler(self.denoiser, policy)(self._problem.noise(self._numbers))
        assert isinstance(end, Tensor)
        return (end - self._target).double().square().flatten(1).mean(1)

    def rmse(self, policy: Policy) -> float:
        """The root of their mean."""
        return math.sqrt(float(self.squares(policy).mean()))


def paper_cell(entry: PaperEntry, ground: MeasuredMixture, nfe: int) -> dict[str, Any]:
    """Base, published and present figures of one learner on one model.

    Where the process does not have the method, ``refused`` says what it answered.
    """
    started = time.perf_counter()
    given = {**entry.settings, "nfe": nfe, "shape": MIXTURE_SHAPE, "progress": False}
    try:
        solver = distill(ground.denoiser, **given)
    except ValueError as refusal:
        return {"nfe": nfe, "refused": str(refusal)}
    base, named = _base(ground, solver.method, solver.settings)
    squares = [ground.squares(policy) for policy in (base, solver.policy)]
    errors = [math.sqrt(float(each.mean())) for each in squares]
    left = None
    same = isinstance(ground.denoiser.process, EDM) and set(entry.published) == {"coordinates"}
    if entry.published and not same:
        with contextlib.suppress(ValueError, FloatingPointError):
            left = ground.rmse(distill(ground.denoiser, **{**given, **entry.published}).policy)
    return {
        "nfe": nfe,
        "base": errors[0],
        "base_name": named,
        "published": left,
        "learned": errors[1],
        "behind": nearer(squares[0], squares[1]),
        "compared": solver.best["compared"],
        "seconds": time.perf_counter() - started,
    }


def _base(ground: MeasuredMixture, method: str, used: Mapping[str, Any]) -> tuple[Policy, str]:
    """What a run with the settings ``used`` improves."""
    kind = LEARNERS[method].settings
    fields = {field.name for field in dataclasses.fields(kind)}
    own = {k: v for k, v in used.items() if k in fields and k not in ("teacher", "loss")}
    settings = kind(**own)
    if method == "dlms":
        policy: Policy = Dlms(ground.denoiser, settings, MIXTURE_SHAPE).policy
        return policy, "untrained"
    tables = _bases(method, settings, ground.denoiser.process)
    errors = {name: ground.rmse(table) for name, table in tables.items()}
    best = min(errors, key=errors.__getitem__)
    return tables[best], best


def papers_page(cells: Mapping[str, Mapping[str, Any]], command: str, nfe: int) -> str:
    """The table in Markdown."""
    grounds = [g for g in MIXTURES if any(key.endswith(f"|{g}") for key in cells)]
    lines = [
        "# The papers' learners on EDM, VP, cosine and flow models",
        "",
        f"Endpoint RMSE at {nfe} evaluations on exact mixture networks (`lab/mixture.py`), on samples "
        "that nothing was trained or chosen on: base -> published algorithm -> **what `distill` "
        "returns**. The base is the method's own handcrafted solver on the best of all standard grids "
        "for that model (of DLMS its untrained start), by these samples; a base that is returned was "
        "chosen on 64 to 1,024 others. Settings are the papers', at a tenth of "
        "their trajectories.",
        "",
        f"    {command}",
        "",
        "| method | " + " | ".join(grounds) + " |",
        "|---|" + "---|" * len(grounds),
    ]
    for entry in _ENTRIES:
        row = [cells.get(f"{entry.name}|{ground}") for ground in grounds]
        lines.append(f"| {entry.name} | " + " | ".join(_figures(found) for found in row) + " |")
    behind = [key.replace("|", " on ") for key, found in cells.items() if found.get("behind")]
    lines += [
        "",
        "Behind its base by more than chance: " + ("; ".join(behind) if behind else "none") + ".",
    ]
    refused = [(k, found["refused"]) for k, found in cells.items() if "refused" in found]
    for key, answer in refused:
        lines += ["", f"{key.replace('|', ' on ')} is refused: {answer}."]
    return "\n".join([*lines, *_deviations(cells)]) + "\n"


_DEVIATIONS = (
    ("Scaled levels. The papers work on x / alpha at sigma / alpha: a network called at another level "
     "gets a rescaled input (`coordinates`), not x as it is", "DLMS, the paper's algorithm|VP"),
    ("Teachers of a few steps, each step trained on its own: AMED can end behind the solver it drives, "
     "which is then kept (`keep`)", "AMED-Plugin on iPNDM|VP"),
    ("GITS's cost measures Euler jumps, not the student: every standard grid is run beside the searched "
     "one (`candidates`)", "GITS, iPNDM|VP"),
    ("D-ODE fits its steps one by one: the plain solver is measured and kept likewise",
     "D-ODE, iPNDM|VP"),
    ("Network times at a rate chosen for LPIPS hardly move (`lr_times_share`, `rounds_times`)",
     "LD3, UniPC|flow"),
)  # fmt: skip


def _deviations(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the columns differ by, with a figure each."""
    lines = [
        "",
        "What the published algorithms do on other processes than EDM, and what is done about it:",
        "",
    ]
    for text, key in _DEVIATIONS:
        found = cells.get(key)
        if found is not None and found.get("published") is not None:
            before, after = found["published"], found["learned"]
            lines.append(f"- {text}: {before:.4f} -> {after:.4f} ({key.replace('|', ' on ')}).")
    return lines


def _figures(found: Mapping[str, Any] | None) -> str:
    if found is None or "refused" in found:
        return "" if found is None else "refused"
    left = "-" if found["published"] is None else f"{found['published']:.4f}"
    return f"{found['base']:.4f} -> {left} -> **{found['learned']:.4f}**"


def _main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--nfe", type=int, default=_NFE)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--grounds", default=",".join(MIXTURES))
    parser.add_argument("--only", default="", help="part of the names of the methods to run")
    chosen = parser.parse_args(argv)
    logging.getLogger("dlms_engine").setLevel(logging.ERROR)  # the page says what they would
    cells: dict[str, Any] = {}
    if chosen.output.exists():
        cells = json.loads(chosen.output.read_text(encoding="utf-8"))
    others = {cell.get("nfe", _NFE) for cell in cells.values()} - {chosen.nfe}
    if others:
        parser.error(
            f"--output {chosen.output} holds cells of {others.pop()} evaluations, --nfe is "
            f"{chosen.nfe}: choose another file"
        )
    for path in filter(None, (chosen.output, chosen.page)):
        require_writable(path)
    for name in chosen.grounds.split(","):
        wanted = [e for e in _ENTRIES if chosen.only in e.name and f"{e.name}|{name}" not in cells]
        ground = MeasuredMixture(name, chosen.samples) if wanted else None
        for entry in wanted:
            assert ground is not None
            cells[f"{entry.name}|{name}"] = found = paper_cell(entry, ground, chosen.nfe)
            print(f"{entry.name} on {name}: {_figures(found)}", flush=True)
            write_text(chosen.output, json.dumps(cells, indent=1) + "\n")
    if chosen.page is not None:
        write_text(chosen.page, papers_page(cells, _COMMAND, chosen.nfe))


if __name__ == "__main__":
    _main()

r"""``method="auto"`` on models that nothing was tuned on: one table, models x evaluations.

    python -m dlms_engine.lab.any_model --folder models --nfe 4,5,6,8,10 --budget 300k \
        --output benchmarks/results/any_model.json --page docs/any_model.md

Cell by cell; what ``--output`` holds already, whatever its budget, is said and not done again. Every
cell distils with default settings but for the budget, and measures the result and the best handcrafted
solver on samples that neither the training nor the choice has seen.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..learners import distill
from ..learners.auto.choose import AutoStage, end_of, ratio
from ..learners.auto.features import features_of, projected_frechet
from ..learners.start import ExactSolution, SamplingProblem
from ..learners.start.contest import candidate_of
from ..models.denoiser import Denoiser
from ..support.files import require_writable, write_text
from . import grounds

_FIRST = 1 << 24
"""Number of the first measured sample: neither training nor choosing uses these."""
WORDS = {
    "flow-2d": "rectified flow, a pinwheel in the plane, velocity",
    "flow-8x8": "rectified flow, 8x8 images, velocity",
    "vp-8x8": "VP, a thousand discrete times, 8x8 images, noise",
    "v-8x8": "the same, v-prediction",
    "guided-8x8": "the same, noise, a class a sample, guidance 2",
    "embedded": "EDM, 16x16 CIFAR-10, the model in the package",
    "examples.published_score_network:hsc32": "a published score network, VP, 32x32 galaxies, noise",
    "examples.published_score_network:ztf32": "another, of another survey",
    "examples.published_score_network:hsc64": "a third, of the first survey at 64x64",
}


def model_called(name: str, folder: Path) -> tuple[Denoiser, tuple[int, ...], Any]:
    """(denoiser, shape, conditions) of a model by name, or of ``module:function`` as for ``--model``."""
    if name == "embedded":
        from ..models.embedded import IMAGE_SHAPE, load_embedded

        return load_embedded(), IMAGE_SHAPE, None
    module, _, function = name.rpartition(":")
    if module:
        return *getattr(importlib.import_module(module), function)(), None
    return grounds.load_ground(name, folder)


def cell(name: str, nfe: int, budget: str, folder: Path, samples: int) -> dict[str, Any]:
    """One model at one number of evaluations."""
    denoiser, shape, conditions = model_called(name, folder)
    with tempfile.TemporaryDirectory() as place:
        solver = distill(
            denoiser, "auto", nfe=nfe, shape=shape, conditions=conditions, budget=budget,
            output=Path(place) / "solver.safetensors",
        )  # fmt: skip
    report = solver.report
    problem = SamplingProblem(denoiser, shape, conditions)
    exact = ExactSolution(problem)
    exact.prove(report["rmse"])
    base = AutoStage("base", candidate_of(problem.process, nfe, report["base"]).table)
    best = AutoStage(report["chosen"], solver.policy)  # type: ignore[arg-type]
    numbers = range(_FIRST, _FIRST + samples)
    target = exact.solve(numbers)
    found: dict[str, Any] = {
        "model": name,
        "nfe": nfe,
        "base": report["base"],
        "chosen": report["chosen"],
        "samples": samples,
        "budget": budget,
        "calls": report["calls"],
        "seconds": report["seconds"],
        "exact_disagreement": exact.prove(report["rmse"]).disagreement,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    features = features_of(problem, target, numbers)
    reference = target if features is None else features
    for stage in (base, best):
        with torch.no_grad():
            end = end_of(problem, stage.policy, numbers)
        stage.squares = (end - target).double().square().flatten(1).mean(1).cpu()
        kind = "base" if stage is base else "auto"
        found[f"{kind}_rmse"] = stage.record()["rmse"]
        seen = end if features is None else features_of(problem, end, numbers)
        assert seen is not None
        found[f"{kind}_frechet"] = projected_frechet(seen, reference)
    found["ratio"], *found["interval"] = ratio(base, best)
    return found


def models_page(cells: list[dict[str, Any]], command: str) -> str:
    """The table in Markdown."""
    names = _in_order(cells)
    nfes = sorted({c["nfe"] for c in cells})
    lines = [
        "# On any model",
        "",
        "`distill` with its default method on models that nothing was tuned for: the endpoint RMSE of "
        "*that* model's best handcrafted solver, found by measuring all of them (`dlms recommend`), "
        "over the result's, at the same number of evaluations. 95 % interval in brackets, on samples "
        "that neither training nor choice has seen. The only setting is the budget.",
        "",
        f"    {command}",
        "",
        "| model | " + " | ".join(f"{nfe} evaluations" for nfe in nfes) + " |",
        "|---|" + "---|" * len(nfes),
    ]
    for name in names:
        row = [f"{_short(name)}: {WORDS.get(name, 'of another package')}"]
        for nfe in nfes:
            found = [c for c in cells if c["model"] == name and c["nfe"] == nfe]
            row.append(_entry(found[-1]) if found else "")
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "Bases, errors, budgets and what was chosen; seconds of one thread (of two with a budget in "
        "minutes), some beside other jobs or halted for a while:",
        "",
    ]
    lines += [
        "| model | evaluations | base | its RMSE | chosen | its RMSE | Frechet, base | chosen | "
        "budget | calls | seconds |",
        "|---|---:|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {_short(c['model'])} | {c['nfe']} | {c['base']} | {c['base_rmse']:.4g} | {c['chosen']} | "
        f"{c['auto_rmse']:.4g} | {c['base_frechet']:.2g} | {c['auto_frechet']:.2g} | "
        f"{c['budget']} | {c['calls']:,} | {c['seconds']:.0f} |"
        for c in sorted(cells, key=lambda c: (names.index(c["model"]), c["nfe"]))
    ]
    return "\n".join(lines) + "\n"


def _in_order(cells: list[dict[str, Any]]) -> list[str]:
    """The models of the cells: the known ones as listed above, then the others."""
    names = {c["model"] for c in cells}
    return [name for name in WORDS if name in names] + sorted(names - set(WORDS))


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _entry(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"**{found['ratio']:.2f}** ({low:.2f} to {high:.2f})"


def _main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the small models are kept"
    )
    parser.add_argument("--models", default=",".join(grounds.GROUNDS))
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--nfes", dest="nfe", help=argparse.SUPPRESS)  # its name before
    parser.add_argument("--budget", default="10m", help="as for dlms distill")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    chosen = parser.parse_args(argv)
    cells: list[dict[str, Any]] = []
    if chosen.output.exists():
        cells = json.loads(chosen.output.read_text(encoding="utf-8"))
    for path in filter(None, (chosen.output, chosen.page)):
        require_writable(path)  # a cell takes minutes
    for nfe in map(int, chosen.nfe.split(",")):
        for name in chosen.models.split(","):
            kept = [c for c in cells if c["model"] == name and c["nfe"] == nfe]
            if kept:
                print(f"== {name}, {nfe} evaluations: kept, of budget {kept[-1]['budget']}")
                continue
            print(f"== {name}, {nfe} evaluations", flush=True)
            cells.append(cell(name, nfe, chosen.budget, chosen.folder, chosen.samples))
            write_text(chosen.output, json.dumps(cells, indent=1) + "\n")
    if chosen.page is not None:
        write_text(chosen.page, models_page(cells, _command(cells, chosen.budget)))


def _command(cells: list[dict[str, Any]], budget: str) -> str:
    """What makes the page."""
    names = ",".join(_in_order(cells))
    nfes = ",".join(map(str, sorted({c["nfe"] for c in cells})))
    return (
        f"python -m dlms_engine.lab.any_model --folder models --models {names} --nfe {nfes} "
        f"--budget {budget} --output benchmarks/results/any_model.json --page docs/any_model.md"
    )


if __name__ == "__main__":
    _main()

"""``dlms demo``: distil a sampler, find the best that needs no training, show both beside the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, emit, parse_numbers
from .model import DeviceOption, Model, condition_rows, load_model

if TYPE_CHECKING:
    from torch import Tensor

    from ..learners.start import Proof, SamplingProblem, Start
    from ..policies.distilled import DistilledSolver

NFE = 5
FIRST_MEASURED = 200_000
"""Of the samples that are measured beside those of the picture."""
SLOW_SECONDS = 0.002
"""Seconds an evaluation of one sample above which the search for the best solver is lean."""
BATCH = 32
NOT_LEARNED = (
    "Within {} nothing was learned on this machine: the sampler called distilled is the best\n"
    "untrained one. dlms demo --fresh --budget 10m gives it longer."
)


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo-out"),
    budget: Annotated[
        str, typer.Option(help="For the distillation: minutes (3m, 90s) or evaluations (50k).")
    ] = "150s",
    nfe: Annotated[int, typer.Option(min=2, help="Network calls of the distilled sampler.")] = NFE,
    samples: Annotated[
        int,
        typer.Option(min=2, help="Samples the comparison is measured on, the picture's included."),
    ] = 48,
    seeds: Annotated[str, typer.Option(help="Seeds of the images in the picture.")] = "0-15",
    fresh: Annotated[bool, typer.Option(help="Start anew instead of continuing.")] = False,
    model: Annotated[
        str, typer.Option(help="'embedded', 'emoji' (slower), or a model of your own.")
    ] = "embedded",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a sampler of few network calls and compare it with the best that needs no training.

    Takes some minutes on two cores. An interrupt ends the distillation with the best result so far;
    what is finished is kept in the folder.
    """
    from ..learners.start import SamplingProblem, seconds_of_one

    started = time.perf_counter()
    shown = parse_numbers(seeds)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder is {folder}, which is a file: choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    from ..lab.plots import check_plot, is_image

    check_plot(folder / "samples.png")
    name, loaded = demo_model(model, device)
    if not is_image(loaded.shape):
        raise ValueError(
            f"model {model!r} has samples of shape {loaded.shape}, which the demo cannot draw: use dlms "
            "distill and dlms evaluate"
        )
    say: Callable[[str], None] = (lambda _text: None) if as_json else typer.echo
    if fresh:
        for path in _written(folder, name, nfe):
            path.unlink(missing_ok=True)
    problem = SamplingProblem(loaded.denoiser, loaded.shape, loaded.conditions)
    kept = _kept(problem, folder, name, nfe)
    effort = "lean" if seconds_of_one(problem) > SLOW_SECONDS else "full"
    twice = 2 * nfe
    then = f"distilling from it ({budget})" if kept is None else "a distilled one of an earlier run"
    say(f"1/3  {name}: the best solver of {nfe} network calls that needs no training, then {then}")
    solver, start = _distilled(
        loaded, folder, name, nfe, budget, effort, kept, progress=not as_json
    )
    say(f"2/3  the best solver of {twice} calls that needs no training")
    doubled = _recommended(loaded, folder, name, twice, effort, progress=not as_json)
    say(f"3/3  measuring on {samples} samples and drawing")
    entries = {
        f"distilled\n{nfe} network calls": solver.policy,
        f"best without training\n{nfe} network calls": start.best.table,
        f"best without training\n{twice} network calls": doubled.best.table,
    }
    measured = [*shown, *range(FIRST_MEASURED, FIRST_MEASURED + max(0, samples - len(shown)))]
    accurate = accurate_samples(loaded, measured, doubled.proof)
    images = {title: sampled(loaded, policy, measured) for title, policy in entries.items()}
    labels = [solver.method, start.best.label, doubled.best.label]
    rows = _rows(entries, labels, images, accurate)
    base_kept = solver.best.get("report", {}).get("chosen") == "base"
    took = solver.settings.get("budget", budget)
    sentence = NOT_LEARNED.format(took) if base_kept else _sentence(rows, nfe)
    title = f"accurate\n{doubled.proof.steps} network calls"
    pictures = _draw(images, (title, accurate), len(shown), rows, solver, folder, sentence)
    seconds = time.perf_counter() - started
    facts = {
        "model": name,
        "rows": rows,
        "times_closer": rows[1]["rmse"] / rows[0]["rmse"],
        "pictures": pictures,
        "solver": _path(folder, name, nfe),
        "samples": len(measured),
        "seconds": seconds,
    }
    emit(facts, as_json, [*_table(rows, len(measured), seconds), sentence, *map(str, pictures)])


def demo_model(spec: str, device: str | None = None) -> tuple[str, Model]:
    """The model and its name; a model of the package comes with a class for every sample, unguided."""
    from .. import models

    if spec not in models.NAMES:
        return spec, load_model(spec, device)
    import torch

    from ..support.parallel import rank_device

    place = "cpu" if device is None else rank_device(device)
    found = models.load(spec, place)
    labels = {"class_labels": torch.arange(len(found.classes))}
    return spec, Model(
        found.denoiser, found.shape, found.features, found.reference, conditions=labels
    )


def sampled(model: Model, policy: Any, seeds: list[int]) -> Tensor:
    """Images ``[len(seeds), *shape]`` in [-1, 1] on the CPU, one from each seed."""
    import torch

    from ..engine.sampler import Sampler

    sampler = Sampler(model.denoiser, policy)
    parts = [seeds[first : first + BATCH] for first in range(0, len(seeds), BATCH)]
    images = [
        sampler.sample(part, model.shape, **condition_rows(model, part)).cpu() for part in parts
    ]
    return torch.cat(images)


def _path(folder: Path, name: str, nfe: int) -> Path:
    return folder / f"{name.replace(':', '-')}-{nfe}.safetensors"


def _written(folder: Path, name: str, nfe: int) -> list[Path]:
    """What this demo keeps in its folder, and nothing else that may be there."""
    made = [folder / "samples.png", folder / "loss.png"]
    for count in (nfe, 2 * nfe):
        solver = _path(folder, name, count)
        beside = (".start.json", ".report.json", ".report.png", ".checkpoint.safetensors")
        made += [solver, *(solver.with_suffix(suffix) for suffix in beside)]
    return made


def _kept(problem: SamplingProblem, folder: Path, name: str, nfe: int) -> DistilledSolver | None:
    """The solver of an earlier run, if the ranking beside it is of a model that answers as this one."""
    from ..learners.start.store import kept_start
    from ..policies.distilled import load_solver

    path = _path(folder, name, nfe)
    if not path.exists() or kept_start(path.with_suffix(".start.json"), problem, nfe) is None:
        return None
    solver: DistilledSolver = load_solver(path)
    return solver


def _distilled(
    model: Model,
    folder: Path,
    name: str,
    nfe: int,
    budget: str,
    effort: Any,
    solver: DistilledSolver | None,
    *,
    progress: bool,
) -> tuple[DistilledSolver, Start]:
    """The solver, of an earlier run where there is one, and the ranking it started from."""
    from .. import learners

    if solver is None:
        path = _path(folder, name, nfe)
        # Before the budget begins: on a slow machine the search alone would use it up.
        _recommended(model, folder, name, nfe, effort, progress=progress)
        solver = learners.distill(
            model.denoiser, "auto", nfe=nfe, shape=model.shape, conditions=model.conditions,
            output=path, budget=budget, effort=effort, progress=progress,
        )  # fmt: skip
    return solver, _recommended(model, folder, name, nfe, effort, progress=False)


def _recommended(
    model: Model, folder: Path, name: str, nfe: int, effort: Any, *, progress: bool
) -> Start:
    """The ranking of handcrafted solvers, kept beside the solvers."""
    from ..learners.start import recommend

    return recommend(
        model.denoiser, nfe, model.shape, conditions=model.conditions, effort=effort,
        store=_path(folder, name, nfe).with_suffix(".start.json"), progress=progress,
    )  # fmt: skip


def accurate_samples(model: Model, seeds: list[int], proof: Proof) -> Tensor:
    """The exact solution of every seed, as it was proved."""
    return sampled(model, proof.table(model.denoiser.process), seeds)


def _rows(
    entries: Mapping[str, Any], labels: list[str], images: Mapping[str, Tensor], accurate: Tensor
) -> list[dict[str, Any]]:
    """Endpoint RMSE of every entry on the same seeds, in the order of the entries."""
    from ..lab.demo_pictures import picture_rmse

    return [
        {
            "sampler": title.replace("\n", ", "),
            "solver": label,
            "nfe": int(policy.nfe),
            "rmse": picture_rmse(images[title], accurate),
        }
        for (title, policy), label in zip(entries.items(), labels, strict=True)
    ]


def _sentence(rows: list[dict[str, Any]], nfe: int) -> str:
    learned, same, double = (row["rmse"] for row in rows)
    text = f"With {nfe} network calls the distilled sampler is {same / learned:.1f} times closer to the "
    text += f"accurate picture than the best untrained one ({rows[1]['solver']})"
    more = "closer" if learned < double else "further away"
    factor = max(double / learned, learned / double)
    return f"{text}, and {factor:.1f} times {more} than that with {2 * nfe} calls."


def _draw(
    images: Mapping[str, Tensor],
    accurate: tuple[str, Tensor],
    shown: int,
    rows: list[dict[str, Any]],
    solver: DistilledSolver,
    folder: Path,
    sentence: str,
) -> list[Path]:
    from ..lab.demo_pictures import compared, learning_curve

    first = accurate[0], accurate[1][:shown]
    others = {title: found[:shown] for title, found in images.items()}
    pictures = [compared(first, others, folder / "samples.png", caption=sentence)]
    errors = learning_errors(solver.history)
    if errors:  # an earlier run's solver does not keep its history
        baselines = {row["sampler"]: row["rmse"] for row in rows[1:]}
        title = f"Learning a sampler of {solver.nfe} network calls"
        pictures.append(learning_curve(errors, baselines, folder / "loss.png", title=title))
    return pictures


def learning_errors(history: list[dict[str, Any]]) -> list[float]:
    """Endpoint RMSE before the first round and after each: the table's rounds, then the corrector."""
    rounds = [entry for entry in history if "rmse_before" in entry]
    errors = [float(rounds[0]["rmse_before"])] if rounds else []
    errors += [float(entry["rmse"]) for entry in rounds]
    return errors + [float(entry["after"]) for entry in history if "after" in entry]


def _table(rows: list[dict[str, Any]], samples: int, seconds: float) -> list[str]:
    width = max(len(row["sampler"]) for row in rows)
    lines = [
        f"{samples} samples from the same noise; distance to the accurate ones (RMSE, values in "
        "[-1, 1]):"
    ]
    lines += [f"  {row['sampler']:{width}}  {row['rmse']:8.5f}  {row['solver']}" for row in rows]
    return [*lines, f"{seconds:.0f} s in all"]

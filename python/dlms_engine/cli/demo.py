"""``dlms demo``: distil on the embedded model, compare with handcrafted solvers, show it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import DeviceOption, JsonOption, Model, emit, load_model, parse_seeds

if TYPE_CHECKING:
    from ..lab.record.measure import Entry, Measured, Measurer
    from ..policies.distilled import DistilledSolver

_NFE = 5
TWICE = 10
# Chosen for the demo's six minutes on two cores.
TRAJECTORIES = 1_920
SETTINGS: dict[str, Any] = {"validation_samples": 32, "validation_steps": 24}
SCREEN, COMPARED, ACCURATE_NFE = 24, 500, 32


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo-out"),
    trajectories: Annotated[
        int, typer.Option(min=1, help="Start noises to train on; more is better and slower.")
    ] = TRAJECTORIES,
    samples: Annotated[
        int, typer.Option(min=2, help="Samples the comparison is measured on.")
    ] = COMPARED,
    seeds: Annotated[str, typer.Option(help="Seeds of the images in the picture.")] = "0-15",
    fresh: Annotated[bool, typer.Option(help="Start anew instead of going on.")] = False,
    model: Annotated[str, typer.Option(hidden=True)] = "embedded",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil a five-evaluation sampler and compare it with the best handcrafted ones.

    About six minutes on two cores. Interrupt it when you like: the same command goes on.
    """
    started = time.perf_counter()
    shown = parse_seeds(seeds)
    folder.mkdir(parents=True, exist_ok=True)
    held = load_model(model, device)
    say = _silent if as_json else typer.echo
    if fresh:
        for path in [*folder.glob("*.safetensors"), *folder.glob("cache/*.safetensors")]:
            path.unlink()
    say(f"1/3  distilling DLMS with {_NFE} network evaluations ({trajectories:,} trajectories)")
    solver = _distilled(held, folder, trajectories, progress=not as_json)
    say(f"2/3  measuring every handcrafted solver at {_NFE} and {TWICE} evaluations")
    rows, best = _compare(held, solver, folder, samples, progress=not as_json)
    say("3/3  drawing")
    pictures = _draw(held, solver, best, shown, folder)
    seconds = time.perf_counter() - started
    facts = {
        "rows": rows,
        "pictures": pictures,
        "solver": _path(folder, trajectories),
        "samples": samples,
        "seconds": seconds,
    }
    emit(facts, as_json, [f"{path}" for path in pictures])
    if not as_json:
        _print_table(rows, samples, seconds)


def _silent(_text: str) -> None:
    pass


def _path(folder: Path, trajectories: int) -> Path:
    return folder / f"dlms-{_NFE}-{trajectories}.safetensors"


def _distilled(model: Model, folder: Path, trajectories: int, *, progress: bool) -> DistilledSolver:
    """The solver of an earlier run where there is one, else a new one; resumes a checkpoint."""
    from .. import learners
    from ..lab import plots
    from ..learners.registry import preset
    from ..policies.distilled import load_solver

    path = _path(folder, trajectories)
    if path.exists():
        held: DistilledSolver = load_solver(path)
        return held
    settings = {**preset("dlms-embedded"), **SETTINGS}
    for name in ("method", "trajectories"):
        settings.pop(name)
    if model.features is None:
        settings["last_step"] = "bottleneck"
    solver = learners.distill(
        model.denoiser,
        "dlms",
        nfe=_NFE,
        shape=model.shape,
        trajectories=trajectories,
        output=path,
        resume=True,
        progress=progress,
        feature_network=model.features,
        **settings,
    )
    plots.loss_curve(
        solver.history, folder / "loss.png", step="update", title="DLMS, 5 evaluations"
    )
    return solver


def _compare(
    model: Model, solver: DistilledSolver, folder: Path, samples: int, *, progress: bool
) -> tuple[list[dict[str, Any]], list[Entry]]:
    """Rows of the table, and the entries they belong to: learned, best at 5, best at 10."""
    from tqdm.auto import tqdm

    from ..lab.record.measure import Entry, Measurer
    from ..lab.record.store import Store
    from ..solvers import handcrafted

    if model.features is None:
        raise ValueError("the demo needs a model with a feature network")
    pools = {
        nfe: [Entry(label, t) for label, t in handcrafted(model.denoiser.process, nfe)]
        for nfe in (_NFE, TWICE)
    }
    screened = min(SCREEN, samples)
    work = screened * sum(len(pool) * nfe for nfe, pool in pools.items())
    work += samples * (2 * ACCURATE_NFE + 2 * _NFE + TWICE)
    bar = tqdm(total=work, unit="eval", unit_scale=True, desc="comparing", disable=not progress)

    def advance(done: int) -> None:
        bar.update(done)

    with bar:
        measurer = Measurer(
            model.denoiser, model.features, model.shape, Store(folder / "cache"), advance=advance
        )
        seeds = range(samples)
        exact = measurer.endpoints(ACCURATE_NFE, seeds)
        best = [Entry("DLMS", solver.policy, learned=True)]
        for nfe, pool in pools.items():
            found = measurer.measure(f"screen-{nfe}", pool, seeds[:screened], exact[:screened])
            ranked = sorted(zip(found, pool, strict=True), key=lambda pair: pair[0].rmse)
            best.append(ranked[0][1])
        measured = [
            measurer.measure(f"compare-{index}", [entry], seeds, exact)[0]
            for index, entry in enumerate(best)
        ]
        rows = _rows(measurer, best, measured, exact, samples)
    return rows, best


def _rows(
    measurer: Measurer, entries: list[Entry], measured: list[Measured], exact: Any, samples: int
) -> list[dict[str, Any]]:
    from ..evaluation.frechet import frechet_distance
    from ..lab.record.measure import Entry

    accurate = Entry("accurate", measurer.accurate_table(ACCURATE_NFE))
    others = range(samples, 2 * samples)
    reference = measurer.measure("accurate-other", [accurate], others)[0].sums
    floor = frechet_distance(reference, measurer.sums(exact))
    rows = [{"solver": "accurate", "nfe": ACCURATE_NFE, "rmse": 0.0, "distance": 0.0}]
    for entry, found in zip(entries, measured, strict=True):
        distance = frechet_distance(reference, found.sums) - floor
        rows.append(
            {"solver": entry.label, "nfe": entry.nfe, "rmse": found.rmse, "distance": distance}
        )
    return rows


def _draw(
    model: Model, solver: DistilledSolver, best: list[Entry], seeds: list[int], folder: Path
) -> list[Path]:
    from .. import solvers
    from ..engine.sampler import Sampler, seeded_noise
    from ..lab import plots
    from ..processes import grids

    process = model.denoiser.process
    exact = solvers.dpm_solver_pp(process, grids.polynomial(process, ACCURATE_NFE), order=3)
    tables: dict[str, Any] = {f"accurate\n{ACCURATE_NFE} evaluations": exact}
    tables |= {f"{entry.label}\n{entry.nfe} evaluations": entry.policy for entry in best}
    panels = {
        label: Sampler(model.denoiser, policy).sample(seeds, model.shape)
        for label, policy in tables.items()
    }
    pictures = [plots.side_by_side(panels, folder / "samples.png", title="The same seeds")]
    sigma = float(process.sigma(exact.t_start))
    table = solver.table(
        model.denoiser, seeded_noise(range(64), model.shape, sigma, device=model.denoiser.device)
    )
    steps = int(table.grid.shape[-1]) - 1
    handcrafted = {
        "polynomial": grids.polynomial(process, steps),
        "logSNR": grids.logsnr(process, steps),
        "time uniform": grids.time_uniform(process, steps),
        "time quadratic": grids.time_uniform(process, steps, 2.0),
    }
    title = f"Learned and handcrafted grids, {table.nfe} evaluations"
    learned = {f"DLMS-{table.nfe} (mean)": table.grid}
    pictures.append(plots.grids(process, handcrafted, learned, folder / "grid.png", title=title))
    return pictures


def _print_table(rows: list[dict[str, Any]], samples: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.frechet import LABEL
    from ..lab.record.report import number

    table = Table(title=f"{samples:,} samples from the same noise, {seconds:.0f} s in all")
    table.add_column("solver")
    for name in ("NFE", "endpoint RMSE", f"{LABEL}\nabove the floor"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (number(row["rmse"]), number(row["distance"]))
        style = "bold" if row["solver"] == "DLMS" else None
        table.add_row(str(row["solver"]), str(row["nfe"]), *figures, style=style)
    Console().print(table)
    Console().print("Best handcrafted solvers are chosen by endpoint RMSE. Lower is better.")

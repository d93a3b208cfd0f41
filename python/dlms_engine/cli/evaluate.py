"""``dlms evaluate``: one sampler's quality, or the whole record."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .checks import HANDCRAFTED, refuse_beside
from .common import (
    AfsOption,
    GridOption,
    JsonOption,
    MethodOption,
    OrderOption,
    SetOption,
    choose_solver,
    command_line,
    emit,
    leads,
    parse_numbers,
    parse_settings,
)
from .model import ConditionsOption, DeviceOption, Model, ModelOption, distance_features, load_model

if TYPE_CHECKING:
    from ..lab.comparison.measure import Entry
    from ..lab.comparison.record import RecordSettings
    from ..lab.comparison.result import Sizes
    from ..processes import Process

RECORD_ONLY = (
    "screen_samples", "exact_samples", "shortlist", "finalists", "full_nfe"
)  # fmt: skip
CACHE = Path("~/.cache/dlms_engine/evaluate")


def evaluate_command(
    context: typer.Context,
    solver: Annotated[
        list[Path] | None, typer.Option(help="Solver file; with --record, repeatable.")
    ] = None,
    method: MethodOption = None,
    nfe: Annotated[
        str | None,
        typer.Option(
            help="Network evaluations, default 5; with --record numbers and ranges, default 3-10."
        ),
    ] = None,
    grid: GridOption = None,
    order: OrderOption = None,
    afs: AfsOption = "off",
    set_: SetOption = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples; default 2000, with --record 10000.")
    ] = None,
    screen_samples: Annotated[
        int, typer.Option(min=2, help="--record: samples every solver is screened on.")
    ] = 64,
    exact_samples: Annotated[
        int, typer.Option(min=2, help="--record: samples the best and the learned are compared on.")
    ] = 2000,
    shortlist: Annotated[
        int, typer.Option(min=1, help="--record: handcrafted solvers compared, by RMSE.")
    ] = 4,
    finalists: Annotated[
        int, typer.Option(min=1, help="--record: of these, measured on all samples.")
    ] = 2,
    full_nfe: Annotated[
        str, typer.Option(help="--record: evaluations with distances on all samples.")
    ] = "5,10",
    exact_nfe: Annotated[int, typer.Option(min=1, help="Evaluations of the exact solution.")] = 200,
    accurate_nfe: Annotated[
        int, typer.Option(min=1, help="Evaluations of the accurate samples.")
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 250,
    record: Annotated[
        bool, typer.Option("--record", help="Compare every handcrafted solver, and the files.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where results and cache go; a second run continues there.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    model: ModelOption = "embedded",
    conditions: ConditionsOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Endpoint RMSE and Frechet distance of a sampler.

    The distance is taken on the model's feature network; without one, on the model's own bottleneck or on
    the samples' values, and the output says which. The RMSE needs no features.
    """
    options = parse_settings(set_)
    from ..engine.sampler import Sampler
    from ..lab.comparison.record import RecordSettings
    from ..lab.comparison.result import Sizes
    from ..lab.plots import new_figure

    if record:
        refuse_beside(
            context, "with --record, which compares every handcrafted solver", HANDCRAFTED[1:]
        )
        if method is not None:
            raise ValueError("--record compares every handcrafted solver: leave out --method")
        settings = RecordSettings(
            nfes=tuple(parse_numbers(nfe or "3-10", "nfe")),
            samples=samples or 10_000,
            batch=batch,
            screen_samples=screen_samples,
            exact_samples=exact_samples,
            full_nfes=tuple(parse_numbers(full_nfe, "full_nfe")),
            shortlist=shortlist,
            finalists=finalists,
            exact_nfe=exact_nfe,
            accurate_nfe=accurate_nfe,
            compile=compile_,
        )
        learned = _learned(solver or [], settings.nfes)
        new_figure(1, 1)  # the page has plots
        held = load_model(model, device, conditions)
        for entry in learned:
            Sampler(held.denoiser, entry.policy)
        _record(held, learned, settings, folder or Path("record-out"), as_json)
        return
    refuse_beside(context, "without --record", RECORD_ONLY)
    if solver:
        refuse_beside(context, "beside --solver FILE", HANDCRAFTED)
    if len(solver or []) > 1:
        raise ValueError("several --solver files are for --record")
    evaluations = _one(nfe or "5")
    held = load_model(model, device, conditions)
    label, policy = choose_solver(
        held.denoiser.process,
        solver[0] if solver else None,
        method,
        evaluations,
        grid=grid,
        order=order,
        afs=afs,
        options=options,
    )
    from ..lab.comparison.measure import Entry

    Sampler(held.denoiser, policy)  # one that does not fit is refused before anything is measured
    count = samples or 2_000
    sizes = Sizes(
        samples=count,
        exact_samples=count,
        batch=batch,
        exact_nfe=exact_nfe,
        accurate_nfe=accurate_nfe,
        screen_samples=0,
    )
    baseline = _baseline(solver[0], held.denoiser.process) if solver else (None, "")
    entries = Entry(label, policy, "file" if solver else None), *baseline
    _single(held, *entries, sizes, compile_, (folder or CACHE).expanduser(), as_json)


def _one(nfe: str) -> int:
    numbers = parse_numbers(nfe, "nfe")
    if len(numbers) > 1 or numbers[0] < 1:
        raise ValueError(f"nfe is {nfe}, expected one number >= 1 (several are for --record)")
    return numbers[0]


def _baseline(path: Path, process: Process) -> tuple[Entry | None, str]:
    """The handcrafted solver that a learned one was measured beside, and what it is to it.

    None where the file names none that can be made.
    """
    from ..lab.comparison.measure import Entry
    from ..policies.distilled import DistilledSolver, load_solver

    held = load_solver(path)
    label = held.baseline if isinstance(held, DistilledSolver) else None
    if not isinstance(held, DistilledSolver) or label is None:
        return None, ""
    kind = "the best handcrafted solver" if held.report else "its base"
    try:
        return Entry(*choose_solver(process, None, label, held.nfe)), kind
    except ValueError:  # a base that no label makes, such as D-ODE's single-step DPM-Solver
        return None, ""


def _single(
    model: Model,
    entry: Entry,
    baseline: Entry | None,
    kind: str,
    sizes: Sizes,
    compiled: bool,
    folder: Path,
    as_json: bool,
) -> None:
    from ..lab.comparison.record import evaluate_one
    from ..lab.evaluation.frechet import label_of_features
    from ..lab.pages import number

    features = distance_features(model)
    label = label_of_features(features)
    distances = importlib.util.find_spec("torchmetrics") is not None
    measure = functools.partial(
        evaluate_one,
        model.denoiser,
        features,
        model.reference,
        model.shape,
        folder=folder,
        settings=sizes,
        compiled=compiled,
        conditions=model.conditions,
        progress=not as_json,
    )
    found = measure(entry, distances=distances)
    base = None if baseline is None else measure(baseline, distances=False)["rmse"]
    lines = [
        f"{entry.label}: {entry.nfe} network evaluations, {sizes.samples:,} samples",
        f"  endpoint RMSE to the exact solution: {number(found['rmse'])}",
        *_beside(
            entry, None if baseline is None else f"{kind}, {baseline.label}", base, found["rmse"]
        ),
        f"  {label}:" if distances else f"  {label}: needs pip install 'dlms-engine[evaluation]'",
        *(
            f"    to {name:17}{number(found[f'to_{side}'])} "
            f"(above its floor: {number(found[f'excess_{side}'])})"
            for side, name in (("accurate", "accurate samples"), ("data", "the data"))
            if f"to_{side}" in found
        ),
    ]
    emit(
        {
            "solver": entry.label,
            "nfe": entry.nfe,
            "samples": sizes.samples,
            "distance": label if distances else None,
            "baseline": None if baseline is None else {"solver": baseline.label, "rmse": base},
            **found,
        },
        as_json,
        lines,
    )


def _beside(entry: Entry, baseline: str | None, base: float | None, rmse: float) -> list[str]:
    from ..lab.pages import number

    if baseline is None or base is None:
        beside = f"the file names none to set beside it, dlms recommend --nfe {entry.nfe} finds it"
        return [f"  the best handcrafted solver: {beside}"] if entry.learned else []
    times = f"{base / rmse:.2f} times this" if rmse > 0 else "not reached"
    return [f"  {baseline}: {number(base)}, {times}"]


def _record(
    model: Model, learned: list[Entry], settings: RecordSettings, folder: Path, as_json: bool
) -> None:
    from ..lab.comparison.page import markdown, publish
    from ..lab.comparison.record import record

    result = record(
        model.denoiser,
        distance_features(model),
        model.reference,
        model.shape,
        learned,
        folder,
        settings,
        conditions=model.conditions,
        progress=not as_json,
    )
    if leads():
        paths = publish(result, folder, "record", command=command_line())
        emit(result, as_json, [markdown(result), *map(str, paths)])


def _learned(files: list[Path], nfes: Sequence[int]) -> list[Entry]:
    """Called after their methods; after their files too where one method has several of one nfe.

    Raises:
        ValueError: a solver of another number of evaluations than those that are compared.
    """
    from ..lab.comparison.measure import Entry
    from ..policies.distilled import load_solver
    from ..solvers.policy import policy_of

    held = [(path, load_solver(path)) for path in files]
    methods = [str(getattr(solver, "method", "table")) for _, solver in held]
    policies = [policy_of(solver) for _, solver in held]
    for path, policy in zip(files, policies, strict=True):
        if policy.nfe not in nfes:
            raise ValueError(
                f"--solver {path} has {policy.nfe} evaluations, which --nfe leaves out: "
                f"{', '.join(map(str, nfes))}"
            )
    of_each = Counter(zip(methods, (policy.nfe for policy in policies), strict=True))
    several = {method for (method, _), count in of_each.items() if count > 1}
    return [
        Entry(f"{method} ({path.stem})" if method in several else method, policy, method)
        for (path, _), method, policy in zip(held, methods, policies, strict=True)
    ]

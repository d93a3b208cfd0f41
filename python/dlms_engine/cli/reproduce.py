"""``dlms reproduce``: the papers' tables."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import refuse_beside
from .common import JsonOption, SetOption, command_line, emit, parse_numbers, parse_settings
from .model import DeviceOption, load_model

if TYPE_CHECKING:
    import torch

    from ..lab.reproduce.data_sets import DataSet
    from ..lab.reproduce.models import PaperModel
    from ..lab.reproduce.settings import Fid

_DTYPES = ("float32", "bfloat16", "float16")


def reproduce_command(
    context: typer.Context,
    table: Annotated[
        str | None, typer.Argument(help="Name of the table; without one, all are listed.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data set, where the table has several.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The published checkpoint of the data set.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="guided-diffusion's classifier (imagenet256-adm).")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line (Stable Diffusion).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="For a single file: directory of a diffusers pipeline like it."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="module:function instead of the published files, as for dlms distill."),
    ] = None,
    fid_weights: Annotated[
        Path | None,
        typer.Option(help="Inception's weights, to measure FID; with --fid-reference."),
    ] = None,
    fid_reference: Annotated[
        Path | None,
        typer.Option(help="FID statistics of the data (.npz with mu and sigma)."),
    ] = None,
    lpips: Annotated[
        Path | None, typer.Option(help="LPIPS weights (.safetensors), LD3's loss.")
    ] = None,
    nfe: Annotated[
        str | None, typer.Option(help="Evaluations to make, such as 4-6; default: the table's.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows to make: parts of their names, with commas.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option(help="Seeds of the distillations; default: as many as the paper.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Samples of the distance; default: the paper's.")
    ] = None,
    exact_samples: Annotated[
        int, typer.Option(min=0, help="Of these, compared with exact solutions.")
    ] = 1000,
    exact_nfe: Annotated[int, typer.Option(min=1, help="Evaluations of the exact solution.")] = 200,
    accurate_nfe: Annotated[
        int, typer.Option(min=1, help="Without FID: evaluations of the accurate samples.")
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 250,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample.")] = 0,
    set_: SetOption = None,
    folder: Annotated[
        Path, typer.Option(help="Where everything is kept; a second call continues there.")
    ] = Path("reproduce-out"),
    only_estimate: Annotated[
        bool, typer.Option("--estimate", help="Say how long it takes, and stop.")
    ] = False,
    device: DeviceOption = None,
    dtype: Annotated[
        str, typer.Option(help=f"Of the network's weights, one of {', '.join(_DTYPES)}.")
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Reproduce a table of the DLMS, AMED, LD3 or D-ODE paper beside the published figures.

    FID needs --fid-weights and --fid-reference. Without them it reports the endpoint RMSE and a Frechet
    distance on the network's own features, which are not FID. --set changes the papers' settings.
    """
    from ..lab.reproduce import tables

    if table is None:
        others = [name for name in context.params if name not in ("table", "as_json")]
        refuse_beside(context, "without the name of a table", others)
        _list(as_json)
        return
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if model is not None:
        refuse_beside(context, "beside --model, which brings its own network", ("dtype",))
    chosen = tables.published_table(table)
    panel = chosen.panel(data)
    from ..lab.reproduce.data_sets import DATA_SETS

    kind = DATA_SETS[panel.data]
    files = {
        "checkpoint": checkpoint, "classifier": classifier, "prompts": prompts, "config": config,
    }  # fmt: skip
    fid = _fid(kind, fid_weights, fid_reference)
    held = _model(kind, files, model, device, dtype)
    from ..lab.reproduce.page import write_pages
    from ..lab.reproduce.run import Reproduction
    from ..lab.reproduce.settings import ReproduceSettings

    settings = ReproduceSettings(
        samples=samples or kind.samples,
        nfes=None if nfe is None else tuple(parse_numbers(nfe, "nfe")),
        rows=() if rows is None else tuple(part.strip() for part in rows.split(",")),
        training_seeds=None if seed is None else tuple(parse_numbers(seed, "seed")),
        exact_samples=exact_samples,
        exact_nfe=exact_nfe,
        accurate_nfe=accurate_nfe,
        batch=batch,
        first_seed=first_seed,
        changes=parse_settings(set_) or None,
    )
    work = Reproduction(
        chosen, panel, held, folder, settings,
        fid=fid, lpips=lpips, files=_checksums(kind, {**files, "fid-weights": fid_weights}),
    )  # fmt: skip
    typer.echo(f"{table}, {panel.data}: {work.estimate.line()}", err=True)
    if only_estimate:
        emit(work.estimate.facts(), as_json, [])
        return
    result = work.run(progress=not as_json)
    pages = write_pages(result, folder, command=command_line())
    emit(result, as_json, [pages[0].read_text(encoding="utf-8"), *map(str, pages)])


def _list(as_json: bool) -> None:
    """Every table, its data sets and what they need."""
    from ..lab.reproduce.data_sets import DATA_SETS, INCEPTION
    from ..lab.reproduce.tables import published_tables

    found: list[dict[str, Any]] = []
    lines: list[str] = []
    papers: set[str] = set()
    for table in published_tables().values():
        if table.paper not in papers:
            papers.add(table.paper)
            lines.append(table.paper)
        lines.append(f"  {table.name}: Table {table.number}, {table.title}")
        for data, panel in table.panels.items():
            needs = [str(file) for file in DATA_SETS[data].files]
            nfes = list(panel.nfes)
            count = DATA_SETS[data].samples
            lines.append(
                f"    --data {data}: NFE {', '.join(map(str, nfes))}; {count:,} samples; needs "
                + ", ".join(f"--{file.option} {file.name}" for file in DATA_SETS[data].files)
            )
            found.append(
                {
                    "table": table.name, "paper": table.paper, "number": table.number,
                    "title": table.title, "data": data, "nfe": nfes, "needs": needs,
                    "samples": DATA_SETS[data].samples, "runs": table.runs,
                    "rows": [row.name for row in panel.rows],
                }
            )  # fmt: skip
    lines += ["", "What the data sets need:"]
    for kind in DATA_SETS.values():
        lines += [f"  {kind.name}: {kind.model}", *(f"    {file}" for file in kind.files)]
        lines.append(f"    for FID: {kind.reference}")
    lines.append(f"  for FID, always: {INCEPTION}")
    emit({"tables": found, "fid": str(INCEPTION)}, as_json, lines)


def _model(
    kind: DataSet, files: dict[str, Path | None], spec: str | None, device: str | None, dtype: str
) -> PaperModel:
    import torch

    from ..lab.reproduce.models import PaperModel, load_paper_model
    from ..support.parallel import rank_device

    if spec is not None:
        given = [name for name, path in files.items() if path is not None]
        if given:
            raise ValueError(f"give --model or --{given[0]}, not both")
        held = load_model(spec, device)
        return PaperModel(held.denoiser, held.shape, held.conditions)
    kind.check(files)
    place: torch.device | str = "cpu" if device is None else rank_device(device)
    present = {name: path for name, path in files.items() if path is not None}
    return load_paper_model(kind, present, place, getattr(torch, dtype))


def _fid(kind: DataSet, weights: Path | None, statistics: Path | None) -> Fid | None:
    from ..lab.reproduce.data_sets import INCEPTION
    from ..lab.reproduce.inception import read_fid_statistics, read_inception
    from ..lab.reproduce.settings import Fid

    if weights is None and statistics is None:
        return None
    if weights is None or statistics is None:
        missing = INCEPTION if weights is None else kind.reference
        raise ValueError(
            f"FID needs --fid-weights and --fid-reference, {missing} is missing: give it, or neither for "
            "the endpoint RMSE and a distance that is not FID"
        )
    return Fid(read_inception(weights), read_fid_statistics(statistics))


def _checksums(kind: DataSet, given: dict[str, Path | None]) -> list[dict[str, Any]]:
    """Of the files that were given: SHA-256, and that of the published file where it is known."""
    published = {file.option: file.sha256 for file in kind.files}
    found = []
    for option, path in given.items():
        if path is not None:
            known = published.get(option) or None
            found.append(
                {"option": option, "file": path.name, "sha256": _sha256(path), "published": known}
            )
    return found


def _sha256(path: Path) -> str | None:
    """Of a file; None of a directory."""
    if path.is_dir():
        return None
    total = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 24):
            total.update(part)
    return total.hexdigest()

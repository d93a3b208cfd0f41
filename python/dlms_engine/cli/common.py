"""What the commands share: models, seeds, solver choices, settings and output."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.denoiser import Denoiser
    from ..models.embedded import ReferenceStatistics
    from ..processes import Process
    from ..solvers.policy import Policy

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
ModelOption = Annotated[
    str,
    typer.Option(
        help="'embedded', 'emoji', 'emoji-flow', 'cifar10-32' (see docs/benchmark_model.md), or "
        "module:function in the current folder or installed; it returns (denoiser, sample shape) "
        "or (denoiser, sample shape, conditions)."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where the networks run: cpu, cuda or cuda:N. Default: where they load."),
]
ConditionsOption = Annotated[
    Path | None,
    typer.Option(
        help="Safetensors file of the network's keyword tensors: with M rows, sample or seed i gets "
        "row i mod M."
    ),
]
SolverOption = Annotated[Path | None, typer.Option(help="Solver file written by dlms distill.")]
MethodOption = Annotated[
    str | None,
    typer.Option(
        help="Handcrafted solver instead of a file: ipndm, or a label such as ipndm4/polynomial."
    ),
]
NfeOption = Annotated[int, typer.Option(min=1, help="Network evaluations.")]
GridOption = Annotated[
    str | None,
    typer.Option(
        help="Time grid: polynomial, logsnr, time_uniform, time_quadratic, discrete or shifted. "
        "Default: time_uniform for a flow, else polynomial."
    ),
]
OrderOption = Annotated[int | None, typer.Option(min=1, help="Order, where the solver has one.")]
AfsOption = Annotated[
    str, typer.Option(help="Analytical first step: off, dockhorn or zero (saves one evaluation).")
]
BackendOption = Annotated[str, typer.Option(help="auto, eager, cpu, cuda or triton.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, may be given many times.")
]


@dataclass(frozen=True)
class Model:
    """A model the commands work on; ``features`` and ``reference`` serve the Frechet distance.

    ``conditions`` are the network's keyword arguments, see ``learners.start.Conditions``.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    features: nn.Module | None = None
    reference: ReferenceStatistics | None = None
    conditions: Any = None


def load_model(spec: str, device: str | None = None, conditions: Path | None = None) -> Model:
    """A model of the package, a benchmark model, or what ``module:function`` returns.

    ``conditions``, a safetensors file, takes the place of the model's own.

    Its networks are on ``device``; under torchrun "cuda" is the rank's own. None leaves them where
    they load: the CPU, but for a benchmark model (DLMS_MODEL_DEVICE).

    Raises:
        ValueError: no such function, it returns something else, there is no such device, or the
            conditions are not tensors.
        FileNotFoundError: the benchmark model has not been made, or there are no such conditions.
    """
    if conditions is not None:
        from ..learners.start.problem import read_conditions

        return replace(load_model(spec, device), conditions=read_conditions(conditions))
    from .. import models
    from ..support.parallel import rank_device

    place = None if device is None else rank_device(device)
    if spec == "embedded":
        return _embedded(place)
    if spec in models.NAMES:
        return Model(*models.load(spec, place or "cpu")[:4])
    module_name, _, function_name = spec.partition(":")
    if not function_name:
        from ..lab import benchmark_model

        if spec in benchmark_model.RECIPES:
            return Model(*benchmark_model.load_benchmark_model(spec, place))
        names = ("embedded", *models.NAMES, *benchmark_model.RECIPES)
        raise ValueError(
            f"model is {spec!r}, expected {', '.join(map(repr, names))} or module:function"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {spec!r} cannot be imported: {error}") from error
    found = function()
    if not isinstance(found, Model):
        if not isinstance(found, tuple) or len(found) not in (2, 3):
            raise ValueError(
                f"model {spec!r} returned {type(found).__name__}, expected (denoiser, shape) or "
                "(denoiser, shape, conditions)"
            )
        conditions = found[2] if len(found) == 3 else None
        found = Model(found[0], tuple(found[1]), conditions=conditions)
    if place is not None:
        found.denoiser.to(place)
        if found.features is not None:
            found.features.to(place)
    return found


def _embedded(device: torch.device | None) -> Model:
    import torch

    from ..models import embedded
    from ..models.denoiser import Denoiser
    from ..processes import EDM

    network = embedded.embedded_network(device or "cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = Denoiser(
        network, EDM(), "edm", sigma_data=embedded.SIGMA_DATA, features="unet.mid_block"
    )
    features = embedded.embedded_features(device or "cpu")
    return Model(denoiser, embedded.IMAGE_SHAPE, features, embedded.embedded_reference())


def of_model(spec: str) -> str:
    """`` --model SPEC`` for a command line to show, empty for the default model."""
    return "" if spec == "embedded" else f" --model {spec}"


def samples_name(model: Model) -> str:
    """A name for samples that ``dlms sample`` can write: a picture of images, else raw values."""
    return "samples.png" if is_image(model.shape) else "samples.safetensors"


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether samples can be drawn: ``[C, H, W]`` with one channel or three."""
    return len(shape) == 3 and shape[0] in (1, 3)


def condition_rows(
    model: Model, seeds: Sequence[int], device: torch.device | None = None
) -> dict[str, Any]:
    """The network's keywords for these samples, on its device or another; see
    ``learners.start.Conditions``.
    """
    from ..learners.start.problem import conditions_on, read_conditions, rows_of

    conditions = read_conditions(model.conditions)
    return rows_of(conditions_on(conditions, device or model.denoiser.device), seeds)


def distance_features(model: Model) -> nn.Module:
    """The model's feature network, else its own bottleneck, else its values; ``label`` names them."""
    if model.features is not None:
        return model.features
    from ..lab.evaluation.own_features import own_features

    conditional = getattr(model, "conditions", None) is not None
    return own_features(model.denoiser, model.shape, conditional=conditional)


def parse_seeds(text: str) -> list[int]:
    """``"0-3,7"`` -> [0, 1, 2, 3, 7].

    Raises:
        ValueError: not of that form, a range that runs backwards, or a seed beyond 64 bits.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds is {text!r}, expected numbers and ranges such as 0-15,42")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"seeds: {part.strip()!r} runs backwards")
        if stop >= 1 << 64:
            raise ValueError(f"seeds: {stop} is beyond 64 bits, expected 0 to 2^64 - 1")
        seeds.extend(range(int(first), stop + 1))
    return seeds


_PYTHON = {"True": "true", "False": "false", "None": "null"}


def parse_settings(pairs: Sequence[str] | None) -> dict[str, Any]:
    """``["lr=1e-3", "afs=false"]`` -> values read as JSON where they are JSON, else as text.

    Python's True, False and None are understood; ``teacher.order`` is ``teacher_order``.

    Raises:
        ValueError: no '=', or a key given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_").replace(".", "_")
        if not equals or not key:
            raise ValueError(f"--set {pair!r}: expected key=value")
        if key in settings:
            raise ValueError(f"--set {key} is given twice")
        try:
            settings[key] = json.loads(_PYTHON.get(value, value))
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def choose_solver(
    process: Process,
    solver: Path | None,
    method: str | None,
    nfe: int,
    *,
    grid: str | None = None,
    order: int | None = None,
    afs: str = "off",
    options: Mapping[str, Any] | None = None,
) -> tuple[str, Policy]:
    """(label, policy) of a solver file or of a handcrafted solver; iPNDM when neither is named.

    Args:
        grid: None for the process's own (``grids.default_grid``).

    Raises:
        ValueError: both are named, or the file is not a solver.
    """
    if solver is not None and method is not None:
        raise ValueError("give --solver FILE or --method NAME, not both")
    from ..processes.grids import default_grid
    from ..solvers.registry import handcrafted_table, label_of, parse_label

    if solver is None:
        twice = sorted({"grid", "order", "afs"} & set(options or {}))
        if twice:
            raise ValueError(f"--set {twice[0]}=...: use --{twice[0]} instead")
        said = parse_label(method or "ipndm")
        if "/" in (method or "") and (order is not None or grid is not None or afs != "off"):
            raise ValueError(
                f"method {method!r} is a whole label: leave out --grid, --order, --afs"
            )
        grid = said.grid or grid or default_grid(process)
        afs = said.afs if said.afs != "off" else afs
        order = said.options.pop("order", order)
        settings = {**said.options, **(options or {})}
        table = handcrafted_table(
            process, said.method, nfe, grid=grid, order=order, afs=afs, **settings
        )
        return label_of(table, grid), table
    from ..policies.distilled import load_solver
    from ..solvers.policy import policy_of

    held = load_solver(solver)
    policy = policy_of(held)
    return f"{getattr(held, 'method', 'table')}-{policy.nfe}", policy


def emit(facts: Mapping[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Prints the facts as JSON, or the lines; of several processes the first alone does."""
    if not leads():
        return
    if as_json:
        typer.echo(json.dumps(_jsonable(facts)))
        return
    for line in lines:
        typer.echo(line)


def leads() -> bool:
    """Whether this process is the one that writes and prints: rank 0."""
    from ..support.parallel import World

    return World.current().rank == 0


def _jsonable(value: Any) -> Any:
    """Paths as text; numbers that JSON has no word for as null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(held) for held in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

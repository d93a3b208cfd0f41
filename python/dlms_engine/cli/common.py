"""What the commands share: seeds, solver choices, settings and output."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..support.values import json_value

if TYPE_CHECKING:
    from ..processes import Process
    from ..solvers.policy import Policy

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
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
    list[str] | None, typer.Option("--set", help="A setting, key=value; repeatable.")
]


MOST_NUMBERS = 10_000_000


def parse_numbers(text: str, name: str = "seeds") -> list[int]:
    """``"0-3,7"``, given as ``name``, -> [0, 1, 2, 3, 7].

    Raises:
        ValueError: not of that form, a range that runs backwards, a number beyond 64 bits, or
            more than ``MOST_NUMBERS``.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{name} is {text!r}, expected numbers and ranges such as 0-15,42")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"{name}: {part.strip()!r} runs backwards")
        if stop >= 1 << 64:
            raise ValueError(f"{name}: {stop} is beyond 64 bits, expected 0 to 2^64 - 1")
        if len(numbers) + stop - int(first) >= MOST_NUMBERS:
            raise ValueError(f"{name} is {text!r}, expected at most {MOST_NUMBERS:,} numbers")
        numbers.extend(range(int(first), stop + 1))
    return numbers


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
        ValueError: both are named, an option contradicts the label, or the file is not a solver.
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
        settings = {**(options or {}), **({} if order is None else {"order": order})}
        for name, value in said.options.items():
            if settings.setdefault(name, value) != value:
                raise ValueError(
                    f"method {method!r} says {name}={value!r}, the options {name}={settings[name]!r}: "
                    "leave one out"
                )
        table = handcrafted_table(process, said.method, nfe, grid=grid, afs=afs, **settings)
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
        typer.echo(json.dumps(json_value(facts)))
        return
    for line in lines:
        typer.echo(line)


def command_line() -> str:
    """The command as it was typed, for pages that say how they were made."""
    return shlex.join(["dlms", *sys.argv[1:]])


def leads() -> bool:
    """Whether this process is the one that writes and prints: rank 0."""
    from ..support.parallel import World

    return World.current().rank == 0

"""``dlms distill --config FILE``: a command's options and settings from YAML or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..support.files import read_text, write_text, written

_SETTINGS = "settings"
_HELD = "dlms_engine.config"
# What only a command line may say, or what says nothing about the result.
_NOT_IN_FILES = {"as_json", "config", "help", "set_", "show_config"}
_NOT_RECORDED = {
    "budget",
    "capture",
    "output",
    "overwrite",
    "plot",
    "preset",
    "resume",
    "tensorboard",
}
_RESOLVED = {"method", "nfe", "seed", "trajectories"}


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's options the defaults of the command; options given win."""
    if path is None:
        return None
    held = _read_config(path)
    names = {str(p.name) for p in context.command.params} - _NOT_IN_FILES
    known = sorted(names | {_SETTINGS})
    settings = held.pop(_SETTINGS, None) or {}
    for key in held:
        if key not in names:
            raise ValueError(f"{path}: unknown key {key!r}; known keys: {', '.join(known)}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: {_SETTINGS} is {settings!r}, expected names with values")
    context.meta[_HELD] = {str(key).replace("-", "_"): v for key, v in settings.items()}
    repeatable = {str(p.name) for p in context.command.params if getattr(p, "multiple", False)}
    context.default_map = {
        key: _words(value) if key in repeatable else str(value)
        for key, value in held.items()
        if value is not None
    }
    return path


def _words(value: Any) -> list[str]:
    """Of an option that may be given many times: one value, a list, or names with values."""
    if isinstance(value, Mapping):
        return [f"{name}={json.dumps(held)}" for name, held in value.items()]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        callback=_read,
        is_eager=True,
        help="YAML or JSON file with options by name and the method's 'settings'; options win.",
    ),
]
ShowConfigOption = Annotated[
    bool,
    typer.Option("--show-config", help="Print the resolved configuration, for --config, and stop."),
]


def _read_config(path: Path) -> dict[str, Any]:
    """The mapping in ``path``: JSON where the name ends in .json, else YAML; never code.

    Raises:
        ValueError: no such file, not YAML or JSON, or not a mapping.
        ImportError: PyYAML is needed and missing.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is no text in UTF-8: {error}") from error
    try:
        found = json.loads(text) if path.suffix == ".json" else _yaml().safe_load(text)
    except Exception as error:
        if isinstance(error, ImportError):
            raise
        raise ValueError(f"config: {path} cannot be understood: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"config: {path} holds {type(found).__name__}, expected keys with values")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YAML is read and written by PyYAML: pip install 'dlms_engine[yaml]' (pyyaml); .json "
            "files need nothing"
        ) from error
    return yaml


def file_settings(context: typer.Context) -> dict[str, Any]:
    """The ``settings`` of the file given with ``--config``; empty without one."""
    return dict(context.meta.get(_HELD, {}))


def given(context: typer.Context, name: str) -> bool:
    """Whether option ``name`` was said, on the command line or in the file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP", "ENVIRONMENT")


def said_here(context: typer.Context, name: str) -> bool:
    """Whether option ``name`` was said on the command line, which wins over the file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def configuration(context: typer.Context, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What ``--config`` needs to do the same again: the options said and all settings.

    The output and what concerns the run alone (resume, overwrite, plot, ...) are left out; a preset
    is written out as its settings.
    """
    said = {
        name: value
        for name, value in context.params.items()
        if given(context, name) and name not in _NOT_IN_FILES | _NOT_RECORDED | _RESOLVED
    }
    return {**{name: _plain(value) for name, value in said.items()}, **resolved}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def show_configuration(configuration: Mapping[str, Any], as_json: bool) -> None:
    """Prints it as YAML, or as JSON."""
    if as_json:
        typer.echo(json.dumps(configuration))
        return
    typer.echo(_yaml().safe_dump(dict(configuration), sort_keys=False), nl=False)


def write_beside(output: Path, configuration: Mapping[str, Any]) -> Path:
    """Writes ``OUTPUT.config.json``, where OUTPUT is the solver file without its suffix."""
    path = output.with_suffix(".config.json")
    write_text(path, json.dumps(configuration, indent=2) + "\n")
    return path


def write_resolved(output: Path, configuration: dict[str, Any], solver: Any) -> None:
    """``write_beside`` of what a run ended with: a base may have been measured. A failure is told."""
    from ..learners.registry import learner

    begin = learner(solver.method).begin
    for name in () if begin is None else begin.settings:
        configuration["settings"][name] = solver.settings[name]
    written(lambda: write_beside(output, configuration), f"{output} is written, but")

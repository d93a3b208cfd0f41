"""A model of the user's own, ``module:function``: imported, called, and what it returned checked."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .errors import own_line

RETURNS = "(denoiser, shape) or (denoiser, shape, conditions)"


def own_model(spec: str, whole: type | tuple[type, ...] = ()) -> Any:
    """What the function of ``spec``, ``module:function``, returned: a tuple of two or three.

    Args:
        whole: what it may return as well.

    Returns:
        ``(denoiser, shape, conditions)``, checked; of the type ``whole`` as it is.

    Raises:
        ValueError: no such module or function, either raised, or it returned something else.
    """
    module_name, _, function_name = spec.partition(":")
    _check_name(spec, module_name, function_name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"model {spec!r}: {_why_not(module_name, error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        here = getattr(module, "__file__", module_name)
        what = "no function" if function is None else f"no function but {type(function).__name__}"
        raise ValueError(f"model {spec!r}: {function_name!r} is {what} in {here}")
    try:
        found = function()
    except Exception as error:
        raise ValueError(f"model {spec!r}: {_told(error)}") from error
    return found if isinstance(found, whole) else _checked(spec, found)


def file_hint(spec: str) -> str:
    """``"; mine.py is here: ..."`` where a spec without a function names a file or a module of one."""
    name = spec.removesuffix(".py")
    if not name.isidentifier() or not Path(f"{name}.py").is_file():
        return ""
    return f"; of {name}.py, which is here, name the function that returns the model: {name}:model"


def _check_name(spec: str, module_name: str, function_name: str) -> None:
    parts = module_name.removesuffix(".py").split(".")
    if all(part.isidentifier() for part in parts) and not module_name.endswith(".py"):
        return
    stem = Path(module_name).stem
    folder = Path(module_name).parent
    said = f"model is {spec!r}, expected module:function, the module as `import` names it"
    if not stem.isidentifier():
        raise ValueError(said)
    where = "" if folder == Path(".") else f" in the folder {folder}"
    raise ValueError(f"{said}: try --model {stem}:{function_name}{where}")


def _why_not(module_name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
        return (
            f"there is no module {error.name!r}: neither a file {error.name}.py in {Path.cwd()} nor "
            "an installed package"
        )
    return f"importing {module_name} raised {_told(error)}"


def _told(error: Exception) -> str:
    place = own_line(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def _checked(spec: str, found: Any) -> tuple[Any, tuple[int, ...], Any]:
    from ..models.denoiser import Denoiser
    from ..support.values import whole_number

    if not isinstance(found, tuple) or len(found) not in (2, 3):
        what = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"model {spec!r} returned {what}, expected {RETURNS}")
    denoiser, shape = found[:2]
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            f"model {spec!r} returned {type(denoiser).__name__} first, expected {RETURNS}: wrap the "
            "network, dlms_engine.Denoiser(network, process, prediction)"
        )
    if not isinstance(shape, tuple | list):
        raise ValueError(
            f"model {spec!r} returned the shape {shape!r}, expected that of one sample, such as "
            "(3, 32, 32)"
        )
    sizes = tuple(whole_number(size, f"model {spec!r}: a size in shape") for size in shape)
    return denoiser, sizes, found[2] if len(found) == 3 else None

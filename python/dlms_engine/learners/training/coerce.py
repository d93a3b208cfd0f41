"""Settings from text and YAML as the types their dataclass declares."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NOTHING = ("none", "null", "~")
TRUE = ("true", "on")
FALSE = ("false", "off")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` asks, where text or a list says it in another form.

    Text becomes a number (``"1e-3"``), a truth value (``"off"``), None (``"none"``) or a tuple
    (``"0.5,1"``, and lists); a whole float becomes an int where one is expected. What is no number,
    truth value or tuple at all (names, tables, tensors) is handed on as it is: its class checks it.

    Raises:
        ValueError: a number, truth value or tuple is expected and this is none.
    """
    try:
        return _convert(value, hint)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, expected {expected(hint)}") from None


def check_choices(settings: Any) -> None:
    """Raises ValueError if a field of this dataclass with listed choices holds another value."""
    resolved = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        hint, value = resolved[field.name], getattr(settings, field.name)
        choices = _choices(hint)
        if choices and value not in choices:
            raise ValueError(f"{field.name} is {value!r}, expected {expected(hint)}")


def check_least(settings: Any, prefix: str = "", **least: float) -> None:
    """Raises ValueError if a field of this dataclass is below its least value, or NaN; None is not.

    Args:
        prefix: goes before the fields' names in the message, as in ``teacher_order``.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{prefix}{name} is {value}, expected at least {bound}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """All values of a hint that lists them, ``Literal[...]`` or that ``| None``; else ()."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return ()
    parts = [(None,) if a is types.NoneType else _choices(a) for a in get_args(hint)]
    return tuple(value for part in parts for value in part) if all(parts) else ()


def expected(hint: Any) -> str:
    """``hint`` in words: "a number or None"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(expected(argument) for argument in arguments))
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list of: {expected(arguments[0])}" if arguments else "a list"
    if origin is dict or hint is dict:
        return "a mapping"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "None",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(value, arguments)
    if origin is Literal:
        return value  # its dataclass lists the choices
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _sequence(value, arguments)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    maker = _SCALARS.get(hint)
    return value if maker is None else maker(value)


def _union(value: Any, choices: tuple[Any, ...]) -> Any:
    if types.NoneType in choices and (
        value is None or (isinstance(value, str) and value.lower() in NOTHING)
    ):
        return None
    if any(_is(value, choice) for choice in choices):
        return value
    for choice in choices:
        try:
            return _convert(value, choice)
        except (TypeError, ValueError):
            continue
    raise ValueError


def _is(value: Any, hint: Any) -> bool:
    """Whether ``value`` is one of ``hint`` already."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value is a or (type(value) is type(a) and value == a) for a in arguments)
    if origin is not None:
        return isinstance(origin, type) and not isinstance(value, str) and isinstance(value, origin)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(hint, type) and isinstance(value, hint)


def _sequence(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        inner = value.strip().strip("()[]")
        value = [part.strip() for part in inner.split(",") if part.strip()]
    elif not isinstance(value, Sequence):
        value = [value]
    return tuple(_convert(item, arguments[0]) for item in value) if arguments else tuple(value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word not in TRUE + FALSE:
        raise ValueError
    return word in TRUE


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _none(value: Any) -> None:
    if value is not None:
        raise TypeError


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    types.NoneType: _none,
}

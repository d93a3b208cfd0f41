"""Listening to a pipeline's modules: every call goes through a listener, hooks included.

The module's class is replaced by a subclass of the same name that overrides ``__call__``, so that
forward hooks, offloading, compiled modules and anything else inside the call stay where they
are.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Original = Callable[..., Any]
Listener = Callable[[nn.Module, Original, tuple[Any, ...], dict[str, Any]], Any]
NumberedListener = Callable[[int, Original, tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Calls of ``module`` go to ``listener(module, original, args, kwargs)`` until ``remove``."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        self.module = module
        self._class = type(module)
        self._listener: Listener | None = listener
        self._made = self._listening()
        # a compiled module forwards setattr to the module inside it
        object.__setattr__(module, "__class__", self._made)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call."""
        return self._class.__call__(self.module, *args, **kwargs)

    def remove(self) -> None:
        """The module is what it was; under another's interception it only stops listening."""
        self._listener = None
        if type(self.module) is self._made:
            object.__setattr__(self.module, "__class__", self._class)

    def _listening(self) -> type[Any]:
        cls = self._class

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            def original(*a: Any, **k: Any) -> Any:
                return cls.__call__(module, *a, **k)

            # a shallow copy has the class, but is another module
            if self._listener is None or module is not self.module:
                return original(*args, **kwargs)
            return self._listener(module, original, args, kwargs)

        return subclass(cls, call)


class Interceptions:
    """One a module: calls of number ``n`` go to ``listener(n, original, args, kwargs)``.

    Attributes:
        names: the modules' names, by number.
        each: their interceptions, by number.
    """

    def __init__(self, listener: NumberedListener) -> None:
        self.names: list[str] = []
        self.each: list[Interception] = []
        self._listener = listener

    def follow(self, modules: Mapping[str, nn.Module]) -> bool:
        """Intercepts ``modules`` and no others; whether they are not those of before."""
        known = {one.module for one in self.each}
        if known == set(modules.values()) and list(modules) == self.names:
            return False
        self.remove()
        self.names = list(modules)
        for number, module in enumerate(modules.values()):
            self.each.append(Interception(module, functools.partial(self._heard, number)))
        return True

    def remove(self) -> None:
        """Takes every interception away."""
        for one in self.each:
            one.remove()
        self.each = []

    def _heard(
        self,
        number: int,
        _module: nn.Module,
        original: Original,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        return self._listener(number, original, args, kwargs)


def subclass(cls: type[Any], call: Callable[..., Any]) -> type[Any]:
    """A subclass of ``cls`` that looks like it and answers calls with ``call``.

    Copies and pickles are of the original class: what listens does not travel with them. The subclass
    compares equal to it, as ``from_pipe`` looks for a component's exact class among the expected ones.
    """

    def original(kind: Any) -> Any:
        return cls if kind is made_class else kind

    def equal(self: Any, other: Any) -> Any:
        one, two = original(self), original(other)
        return True if one is two else type.__eq__(one, two)

    alike = type(
        type(cls).__name__,
        (type(cls),),
        {"__eq__": equal, "__hash__": lambda self: type.__hash__(original(self))},
    )

    def reduce(self: Any, protocol: Any) -> Any:
        plain: Any = cls.__reduce_ex__
        made = plain(self, protocol)
        if not isinstance(made, tuple):
            return made
        arguments = tuple(cls if value is type(self) else value for value in made[1])
        # pickle lets __newobj__ make objects of their present class alone
        make: Any = cls.__new__ if made[0] is copyreg.__newobj__ else made[0]  # type: ignore[attr-defined]
        return (make, arguments, *made[2:])

    members = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    made_class: type[Any] = alike(cls.__name__, (cls,), members)
    return made_class

"""An interpreter of pickle opcodes that builds plain data and calls nothing a file names.

Python's own ``Unpickler`` can restrict which globals a file gets, but not what it does with them:
it sets the state of any object it has (``BUILD`` reaches ``Tensor.__setstate__``), hashes keys nested
a million deep and reads as many elements as the file claims. Here the opcodes are read as data
(``pickletools.genops``), every object is of a type made in this module's tables, and everything that
can grow is limited before it does.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

MAX_OPCODES = 2_000_000
MAX_NODES = 1_000_000  # of the finished tree, shared parts counted as often as they appear
MAX_DEPTH = 200

Factory = Callable[..., Any]


class Refused(ValueError):
    """The pickle asks for something else than plain data, or for too much of it."""


class Global:
    """A name in the file that maps to a factory of this library; never the object it names.

    Args:
        name: as in the file, for messages.
        factory: called with the arguments of ``REDUCE`` or ``NEWOBJ``; checks them itself.
    """

    def __init__(self, name: str, factory: Factory) -> None:
        self.name = name
        self.factory = factory


class _Mark:
    """Where a run of stack items begins."""


_MARK = _Mark()
_KEYS = (str, int, float, bytes, bool, type(None))
_LITERALS = {
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Bounded(io.RawIOBase):
    """A file that never allocates more than it has: claims of a length are cut to the rest."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        here = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(here)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        rest = self._end - self._file.tell()
        return self._file.read(rest if size < 0 else min(size, rest))

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(1 << 20)


def load_pickle(file: IO[bytes], globals_: Mapping[tuple[str, str], Factory]) -> Any:
    """The object in ``file``: containers, numbers, strings, bytes and what ``globals_`` make.

    Args:
        file: seekable and binary.
        globals_: ``(module, name)`` -> factory. An object that a factory makes may have
            ``build(state)``, which takes the state that the file gives it, and may be a dict.

    Raises:
        Refused: an opcode, name, key or amount that is not allowed.
        ValueError: not a pickle.
    """
    result = _Machine(globals_).run(file)
    _limit(result)
    return result


class _Machine:
    def __init__(self, globals_: Mapping[tuple[str, str], Factory]) -> None:
        self._globals = globals_
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        for count, (opcode, argument, _) in enumerate(
            pickletools.genops(cast(IO[bytes], _Bounded(file)))
        ):
            if count >= MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} operations")
            name = opcode.name
            if name == "STOP":
                return self._pop()
            if name in _LITERALS:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            else:
                action = _ACTIONS.get(name)
                if action is None:
                    raise Refused(f"the operation {name}")
                action(self, argument)
        raise ValueError("it ends without STOP")

    # -- stack ------------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("an operation takes more than the stack holds")
        return self._stack.pop()

    def _top(self, kind: type | tuple[type, ...]) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise Refused("an operation on an object that does not have it")
        return self._stack[-1]

    def _take(self, count: int) -> list[Any]:
        return [self._pop() for _ in range(count)][::-1]

    def _since_mark(self) -> list[Any]:
        for index in range(len(self._stack) - 1, -1, -1):
            if self._stack[index] is _MARK:
                items = self._stack[index + 1 :]
                del self._stack[index:]
                return items
        raise ValueError("an operation looks for a mark that is not there")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> None:
        if not self._stack:
            raise ValueError("an operation takes more than the stack holds")
        self._stack.pop()

    # -- containers: those on top of the stack get the items --------------------------------------

    def extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self._top(dict)
        for name, value in _pairs(items):
            target[key(name)] = value

    def add(self, items: list[Any]) -> None:
        self._top(set).update(key(item) for item in items)

    # -- memo -------------------------------------------------------------------------------------

    def put(self, index: Any) -> None:
        if not self._stack:
            raise ValueError("nothing to remember")
        self._memo[len(self._memo) if index is None else int(index)] = self._stack[-1]

    def get(self, index: Any) -> None:
        if int(index) not in self._memo:
            raise ValueError(f"it refers to object {index}, which was not remembered")
        self._stack.append(self._memo[int(index)])

    # -- names and what is made of them -----------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        factory = None
        if isinstance(module, str) and isinstance(name, str):
            factory = self._globals.get((module, name))
        if factory is None:
            raise Refused(f"the file asks for {str(module)[:100]}.{str(name)[:100]}")
        self._stack.append(Global(f"{module}.{name}", factory))

    def make(self) -> None:
        arguments, maker = self._pop(), self._pop()
        if not isinstance(maker, Global) or not isinstance(arguments, tuple):
            raise Refused("a call of something that is not a name")
        try:
            self._stack.append(maker.factory(*arguments))
        except (TypeError, ArithmeticError, LookupError) as exc:
            raise Refused(f"{maker.name} with arguments of unknown form ({exc})") from exc

    def make_with_keywords(self) -> None:
        keywords = self._pop()
        if keywords:
            raise Refused("an object made with keywords")
        self.make()

    def build(self) -> None:
        state, target = self._pop(), self._top(object)
        take = getattr(type(target), "build", None)
        if take is None:
            raise Refused(f"it sets the state of a {type(target).__name__}")
        take(target, state)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a dictionary with a key and no value")
    return list(zip(items[::2], items[1::2], strict=True))


def key(value: Any) -> Any:
    """``value``, if it may be a key of a dictionary or a member of a set."""
    if not isinstance(value, _KEYS):
        raise Refused(f"a {type(value).__name__} as a key")
    if isinstance(value, int) and value.bit_length() > 128:
        raise Refused("a key of more than 128 bits")
    return value


_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.make()),
    "NEWOBJ_EX": lambda m, _: m.make_with_keywords(),
    "BUILD": lambda m, _: m.build(),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(*m._take(2)),
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m._since_mark(),
    "DUP": lambda m, _: m.push(m._top(object)),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "TUPLE": lambda m, _: m.push(tuple(m._since_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m._take(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m._take(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m._take(3))),
    "LIST": lambda m, _: m.push(m._since_mark()),
    "DICT": lambda m, _: m.push({key(k): v for k, v in _pairs(m._since_mark())}),
    "FROZENSET": lambda m, _: m.push({key(item) for item in m._since_mark()}),
    "APPEND": lambda m, _: m.extend(m._take(1)),
    "APPENDS": lambda m, _: m.extend(m._since_mark()),
    "SETITEM": lambda m, _: m.update(m._take(2)),
    "SETITEMS": lambda m, _: m.update(m._since_mark()),
    "ADDITEMS": lambda m, _: m.add(m._since_mark()),
}


def children(node: Any) -> list[Any]:
    """The parts of a container, or of an object by its ``state``."""
    if isinstance(node, Mapping):
        return list(node.values())
    if isinstance(node, (list, tuple)):
        return list(node)
    state = getattr(node, "state", None)
    return [state] if isinstance(state, dict) else []


def _limit(root: Any) -> None:
    """Refuses loops, and trees that are too deep or, with shared parts written out, too large: the
    code that walks them may then be recursive.
    """
    sizes: dict[int, tuple[int, int]] = {}  # id -> nodes, depth; -1 while its parts are looked at
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        parts = children(node)
        if done:
            each = [sizes.get(id(part), (1, 0)) for part in parts]
            nodes, depth = 1 + sum(n for n, _ in each), 1 + max((d for _, d in each), default=0)
            if nodes > MAX_NODES or depth > MAX_DEPTH:
                raise Refused(
                    f"a tree of more than {MAX_NODES} nodes or nested deeper than {MAX_DEPTH}"
                )
            sizes[id(node)] = (nodes, depth)
        elif parts and id(node) not in sizes:
            sizes[id(node)] = (-1, 0)
            stack.append((node, True))
            stack.extend((part, False) for part in parts)
        elif parts and sizes[id(node)][0] < 0:
            raise Refused("an object that contains itself")

#!/usr/bin/env python3
"""Counts how often a thread of a compiled kernel waits for memory in series.

A kernel on a small state does little but wait: for its operands, then for what their addresses
depend on. How often is decided by the assembler, which likes to move a load down to its first use.
This reads the machine code of sm_70 to sm_90, in which every instruction carries its stall cycles,
the scoreboards that it sets and those that it waits for, and walks every path through the kernel with
a round trip to memory of a fixed length. The figure is the length of the slowest path in round trips:
2.0 and the arithmetic for a load whose address comes from another load.

    scripts/serial_waits.py FILE.cubin|FILE.o [--kernel PART-OF-NAME] [--most 2.7]

Exit status 1 if a kernel is above `--most` or cannot be counted, 2 without a disassembler (cuobjdump
and nvdisasm, from the PATH or from Triton's package).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

ROUND_TRIP = 600
"""Cycles of a load from device memory; any number that dwarfs the arithmetic gives like figures."""

SHORT = 30
"""Cycles of the other instructions that set a scoreboard: constants, conversions, special functions."""

MAX_STEPS = 200_000

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"0x([0-9a-f]+)")


class NoDisassembler(FileNotFoundError):
    """There is no cuobjdump, or no nvdisasm for it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control fields."""

    address: int
    text: str
    stall: int
    sets: int  # scoreboard of its result, 7 for none
    waits: int  # mask of scoreboards

    @property
    def conditional(self) -> bool:
        """Whether a predicate guards it."""
        return self.text.startswith("@")

    @property
    def operation(self) -> str:
        """Its name without the modifiers."""
        words = self.text.split()
        return words[1 if self.conditional else 0].split(".")[0]

    @property
    def latency(self) -> int:
        """Cycles until its scoreboard is released."""
        return ROUND_TRIP if self.operation in ("LDG", "LD", "ATOMG", "ATOM") else SHORT


@dataclass
class _Thread:
    """A walk through the code: where and when it is, and when each scoreboard is released."""

    position: int = 0
    time: int = 0
    boards: list[int] = field(default_factory=lambda: [0] * 6)
    stores: int = 0
    repeated: frozenset[int] = frozenset()  # branches back that it has taken

    def copy(self, position: int) -> _Thread:
        return replace(self, position=position, boards=list(self.boards))


def disassembler() -> str:
    """cuobjdump, with nvdisasm where it looks for it.

    Raises:
        NoDisassembler: one of the two is neither on the PATH nor in Triton's package.
    """
    spec = importlib.util.find_spec("triton")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    for place in places:
        folder = place / "backends" / "nvidia" / "bin"
        if folder.is_dir() and str(folder) not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{folder}"
    tool = shutil.which("cuobjdump")
    if tool is None or shutil.which("nvdisasm") is None:
        raise NoDisassembler(
            "cuobjdump and nvdisasm are neither on the PATH nor in Triton's package"
        )
    return tool


def disassemble(path: Path) -> str:
    """The machine code of every kernel in an object file or cubin, with its encoding."""
    return subprocess.check_output([disassembler(), "-sass", str(path)], text=True)


def parse(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel, by the (mangled) name."""
    kernels: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        code = []
        for first, second in itertools.pairwise(lines):
            line, high = _LINE.match(first), _HIGH.match(second)
            if line and high:
                bits = int(high[1], 16)
                code.append(
                    Instruction(
                        address=int(line[1], 16),
                        text=line[2],
                        stall=bits >> 41 & 15,
                        sets=bits >> 46 & 7,
                        waits=bits >> 52 & 63,
                    )
                )
        if not code:
            raise ValueError(f"no instruction is recognised in the code of {lines[0]}")
        kernels[lines[0].strip()] = code
    return kernels


def round_trips(code: list[Instruction], only_memory: bool = False) -> float:
    """Length of the slowest path that stores something, in round trips to memory.

    With ``only_memory`` everything else takes no time: a whole number, how often a load waits for
    another.

    Both directions of every branch are walked; a path that calls a subroutine (the division of 64-bit
    numbers) is left out, and a branch back is taken once.

    Raises:
        ValueError: no path from the start to the end stores anything.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    pending, slowest, steps = [_Thread()], -1, 0
    seen: dict[int, list[_Thread]] = {}
    while pending:
        thread = pending.pop()
        while thread.position < len(code):
            steps += 1
            if steps > MAX_STEPS:
                raise ValueError(f"more than {MAX_STEPS} steps: too many paths to walk")
            here = code[thread.position]
            _issue(thread, here, only_memory)
            if here.operation == "EXIT" and not here.conditional:
                if thread.stores:
                    slowest = max(slowest, thread.time)
                break
            if here.operation in ("CALL", "RET", "BRX", "JMX"):
                if here.conditional:
                    thread.position += 1
                    continue
                break
            if here.operation in ("BRA", "JMP"):
                if _hopeless(thread, seen):
                    break
                if here.conditional:
                    pending.append(thread.copy(thread.position + 1))
                target = index[int(_TARGET.findall(here.text)[-1], 16)]
                if target <= thread.position:
                    if here.address in thread.repeated:
                        break
                    thread.repeated |= {here.address}
                thread.position = target
                continue
            thread.position += 1
    if slowest < 0:
        raise ValueError("no path through the code stores anything")
    return slowest / ROUND_TRIP


def _hopeless(thread: _Thread, seen: dict[int, list[_Thread]]) -> bool:
    """Whether another walk was here as late or later, with every scoreboard and as free to go on."""
    walks = seen.setdefault(thread.position, [])
    for other in walks:
        late = other.time >= thread.time and other.stores >= min(thread.stores, 1)
        late = late and all(a >= b for a, b in zip(other.boards, thread.boards, strict=True))
        if late and other.repeated <= thread.repeated:
            return True
    walks.append(thread.copy(thread.position))
    return False


def _issue(thread: _Thread, here: Instruction, only_memory: bool) -> None:
    for board in range(6):
        if here.waits >> board & 1:
            thread.time = max(thread.time, thread.boards[board])
    if here.sets < 6:
        slow = not only_memory or here.latency == ROUND_TRIP
        release = thread.time + (here.latency if slow else 0)
        thread.boards[here.sets] = max(thread.boards[here.sets], release)
    thread.stores += here.operation == "STG"
    thread.time += 0 if only_memory else max(1, here.stall)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Serial waits for memory in compiled kernels.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--most", type=float, help="fail above this many")
    options = parser.parse_args(argv)
    try:
        kernels = parse(disassemble(options.file))
    except NoDisassembler as error:
        print(f"serial_waits: {error}", file=sys.stderr)
        return 2
    above = 0
    for name, code in kernels.items():
        if options.kernel not in name:
            continue
        try:
            waits = round_trips(code)
        except ValueError as error:
            print(f"    -  {name}: {error}")
            above += options.most is not None
            continue
        above += options.most is not None and waits > options.most
        print(f"{waits:5.2f}  {name}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())

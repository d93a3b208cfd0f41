"""Damaged solver files and crafted pickles: refused by a typed error, soon, and never executed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def forget_peak() -> int:
    """The peak from which ``peak`` counts: what ran before is no fault of this.

    It is what is in memory now, or, where a container does not let it be reset, the highest of the
    process so far: a process of its own measures the same there.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def peak() -> int:
    """Most bytes in memory since ``forget_peak``."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def damage(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.randint(1, 6)):
        at, act = rng.randrange(max(1, len(data))), rng.randrange(5)
        if act == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif act == 1:
            del data[at : at + rng.randint(1, 40)]
        elif act == 2:
            data[at:at] = data[at : at + rng.randint(1, 60)]
        elif act == 3:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        elif data:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**40, 2**63]))
    return data


def damaged(count: int) -> dict[str, Any]:
    """``count`` damaged solver files and a fiftieth of that, at least 60, crafted pickles."""
    from dlms_engine import grids, processes, solvers
    from dlms_engine.checkpoints.restricted import UnsafeCheckpointError, read_pickle
    from dlms_engine.policies.distilled import load_solver, save_solver
    from dlms_engine.solvers.file import SolverFileError

    rng, tally, slowest = random.Random(0), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        good = folder / "good.safetensors"
        edm = processes.EDM()
        save_solver(good, solvers.ipndm(edm, grids.polynomial(edm, 4)))
        raw, path = good.read_bytes(), folder / "damaged.safetensors"
        before, memory = canary(), forget_peak()

        def attempt(data: bytes, kind: str, read: Callable[[Path], object], refused: type) -> None:
            nonlocal slowest
            path.write_bytes(data)
            started = time.thread_time()
            try:
                read(path)
                tally[f"{kind} read"] += 1
            except refused:
                tally[f"{kind} refused"] += 1
            except Exception as error:
                tally[f"{kind} untyped: {type(error).__name__}"] += 1
            slowest = max(slowest, time.thread_time() - started)

        for _ in range(count):
            data = bytes(damage(rng, bytearray(raw)))
            if data != raw:
                attempt(data, "solver", load_solver, SolverFileError)
        for data in crafted(rng, max(60, count // 50)):
            attempt(data, "pickle", read_pickle, UnsafeCheckpointError)
    above = peak() - memory
    return {
        **tally,
        "untyped": sum(n for key, n in tally.items() if "untyped" in key),
        "executed": canary() != before,
        "slowest seconds": round(slowest, 3),
        "MiB above the start": above >> 20,
        "over 1 s or 200 MB": slowest > 1 or above > 200e6,
    }


CANARY = Path(tempfile.gettempdir()) / f"dlms-endurance-{os.getpid()}"


def canary() -> bool:
    """Whether a pickle has run the command that it carries."""
    return CANARY.exists()


class Command:
    """Unpickled, it would make the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def crafted(rng: random.Random, count: int) -> list[bytes]:
    """Pickles that call, claim or nest too much, and plain ones with random damage."""
    import pickle

    values = [Command(), {"model": Command()}, [1, Command()], {"a": [1.5, "x", None]}]
    plain = [pickle.dumps(value, protocol) for value in values for protocol in range(2, 6)]
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, stream, _use_new_zipfile_serialization=False)
    plain.append(stream.getvalue())
    made: list[bytes] = list(plain)
    while len(made) < count:
        kind = rng.randrange(4)
        if kind == 0:
            depth = rng.randint(300, 30_000)
            made.append(b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".")
        elif kind == 1:
            size = struct.pack("<Q", rng.choice([2**31, 2**40, 2**62]))
            made.append(b"\x80\x04" + rng.choice([b"\x8e", b"\x8d"]) + size + b"x.")
        elif kind == 2:
            made.append(b"\x80\x04" + rng.randbytes(rng.randint(1, 200)) + b".")
        else:
            made.append(bytes(damage(rng, bytearray(rng.choice(plain)))))
    return made[:count]

"""Long runs that look for what short tests miss; each prints its figures and exits 0 if all is right.

    python scripts/endurance.py kills 200        commands killed at random moments and called again
    python scripts/endurance.py threads 10000    calls from four threads with changing shapes
    python scripts/endurance.py damaged 50000    damaged solver files, and 1,000 crafted pickles

The seeds are fixed; the moments of the kills are those of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TINY = ("--model", "cli_model:tiny")
DISTILL = ("distill", *TINY, "--nfe", "3")
TRAINED = ("--set=batch=8", "--set=validation_samples=4", "--set=checkpoint_seconds=0")
SIZES = ("--samples=16", "--exact-nfe=8", "--accurate-nfe=6", "--batch=4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "dlms": (*DISTILL, "--method=dlms", "--trajectories=48", *TRAINED),
    "amed": (*DISTILL, "--method=amed", "--trajectories=48", *TRAINED),
    "free_table": (*DISTILL, "--method=free_table", "--trajectories=48", *TRAINED),
    "gits": (*DISTILL, "--method=gits", "--trajectories=16", "--set=points=12"),
    "dode": (*DISTILL, "--method=dode", "--trajectories=32", "--set=scale=3"),
    "sample": ("sample", *TINY, "--method=ddim", "--nfe=5", "--seeds=0-15"),
    "evaluate": ("evaluate", *TINY, "--method=ddim", "--nfe=3", *SIZES),
}
"""Short forms of commands that leave something behind."""


# -- kills -----------------------------------------------------------------------------------------


def arguments(name: str, folder: Path, again: bool) -> list[str]:
    words = list(COMMANDS[name])
    if words[0] == "evaluate":
        return [*words, "--folder", str(folder), "--json"]
    output = ["--output", str(folder / "made.safetensors")]
    if words[0] == "distill":
        return [*words, *output, *(["--resume", "--overwrite"] if again else [])]
    return [*words, *output]


def command(name: str, folder: Path, again: bool) -> Callable[[], None]:
    def run() -> None:
        from dlms_engine.cli import main

        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            try:
                main(arguments(name, folder, again))
            except SystemExit as stop:
                if stop.code:
                    raise RuntimeError(f"{name} ended with {stop.code}") from stop

    return run


def forked(work: Callable[[], None], die_after: float | None) -> tuple[bool, float]:
    """(whether it was killed, seconds); a child that fails by itself ends this program."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    end = None if die_after is None else started + die_after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if end is not None and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the command ended with {code}")
    return code != 0, time.monotonic() - started


def timeless(value: Any) -> Any:
    """JSON without what the clock gives."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k != "folder"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Tensors as bytes and JSON without times, of everything a command left; nothing partial."""
    held: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    raw = opened.get_tensor(key).contiguous().reshape(-1).view(torch.uint8)
                    held[f"{name}/{key}"] = raw.numpy().tobytes()
        elif path.suffix == ".json" and not name.startswith("."):
            held[name] = timeless(json.loads(path.read_text(encoding="utf-8")))
    return held


def kills(count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rng, killed, different = random.Random(0), Counter[str](), []
    names = list(COMMANDS)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        whole, seconds = {}, {}
        for name in names:
            folder = base / "whole" / name
            folder.mkdir(parents=True)
            command(name, folder, False)()  # here, so that the children have imported everything
            whole[name] = contents(folder)
            timed = base / "timed" / name
            timed.mkdir(parents=True)
            _, seconds[name] = forked(command(name, timed, False), None)
            assert contents(timed) == whole[name], name
        print(f"seconds uninterrupted: {seconds}", file=sys.stderr)
        trial = 0
        while killed.total() < count:
            name = names[trial % len(names)]
            folder = base / "made" / "out"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            again = False
            for _ in range(rng.randint(1, 4)):
                died, _ = forked(command(name, folder, again), rng.uniform(0, seconds[name]))
                killed[name] += died
                again = True
            forked(command(name, folder, again), None)
            found = contents(folder)
            if found != whole[name]:
                parts = found.keys() | whole[name].keys()
                first = sorted(k for k in parts if found.get(k) != whole[name].get(k))[:3]
                different.append({"command": name, "trial": trial, "parts": first})
            trial += 1
            print(f"{killed.total()} kills, {len(different)} different", file=sys.stderr)
    return {"kills": killed.total(), "of": dict(killed), "runs": trial, "different": different}


# -- threads ---------------------------------------------------------------------------------------


def threads(count: int) -> dict[str, Any]:
    import cli_model

    from dlms_engine import Sampler, grids, solvers

    torch.set_num_threads(1)
    held = cli_model.tiny()
    process = held.denoiser.process
    tables = [solvers.ipndm(process, grids.polynomial(process, n)) for n in (3, 4, 5)]
    samplers = [Sampler(held.denoiser, table) for table in tables]
    shapes = [(3, 8, 8), (3, 6, 10), (3, 5, 5), (3, 12, 4), (3, 9, 7), (3, 4, 16)]
    cases = [(s, b, shape) for s in range(3) for b in (1, 2, 3, 5) for shape in shapes]

    def run(case: tuple[int, int, tuple[int, ...]]) -> torch.Tensor:
        which, batch, shape = case
        out: torch.Tensor = samplers[which].sample(range(batch), shape)
        return out

    expected = {case: run(case) for case in cases}
    different, lock, left = Counter[str](), threading.Lock(), iter(range(count))
    sizes: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            if number % 500 == 499:
                sizes.append(resident())
            case = rng.choice(cases)
            if not torch.equal(run(case), expected[case]):
                different[str(case)] += 1

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    early, late = sizes[len(sizes) // 4], sizes[-1]
    return {
        "calls": count,
        "threads": 4,
        "shapes": len(cases),
        "seconds": round(time.monotonic() - started, 1),
        "different": sum(different.values()),
        "MiB at a quarter and at the end": [early >> 20, late >> 20],
        "grew": late - early > 16 << 20,
    }


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


# -- damaged files ---------------------------------------------------------------------------------


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


def damaged(count: int, pickles: int = 1000) -> dict[str, Any]:
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
        before, memory = canary(), resident()

        def attempt(data: bytes, kind: str, read: Callable[[Path], object], refused: type) -> None:
            nonlocal slowest
            path.write_bytes(data)
            started = time.process_time()
            try:
                read(path)
                tally[f"{kind} read"] += 1
            except refused:
                tally[f"{kind} refused"] += 1
            except Exception as error:
                tally[f"{kind} untyped: {type(error).__name__}"] += 1
            slowest = max(slowest, time.process_time() - started)

        for _ in range(count):
            data = bytes(damage(rng, bytearray(raw)))
            if data != raw:
                attempt(data, "solver", load_solver, SolverFileError)
        for data in crafted(rng, pickles):
            attempt(data, "pickle", read_pickle, UnsafeCheckpointError)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    untyped = sum(n for key, n in tally.items() if "untyped" in key)
    return {
        **tally,
        "untyped": untyped,
        "executed": canary() != before,
        "slowest seconds": round(slowest, 3),
        "MiB above the start": (peak - memory) >> 20,
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "threads", "damaged"))
    parser.add_argument("count", type=int)
    chosen = parser.parse_args()
    found = globals()[chosen.what](chosen.count)
    print(json.dumps(found, indent=1))
    return int(bool(found.get("different") or found.get("grew") or found.get("untyped")))


if __name__ == "__main__":
    sys.exit(main())

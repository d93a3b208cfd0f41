"""Commands killed at random moments and called again, or called twice at once, leave what they leave
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

TINY = ("--model", "cli_model:tiny")
DISTILL = ("distill", *TINY, "--nfe=3")
TRAINED = ("--trajectories=48", "--set=batch=8", "--set=checkpoint_seconds=0")
VALIDATED = (*TRAINED, "--set=validation_samples=4")
SIZES = ("--exact-nfe=8", "--accurate-nfe=6", "--batch=4", "--json")
COMMANDS: dict[str, tuple[str, ...]] = {
    "dlms": (*DISTILL, "--method=dlms", *VALIDATED),
    "amed": (*DISTILL, "--method=amed", *VALIDATED),
    "free_table": (*DISTILL, "--method=free_table", *VALIDATED),
    "ld3": (*DISTILL, "--method=ld3", *TRAINED, "--set=validation=4", "--set=train=8"),
    "gits": (*DISTILL, "--method=gits", "--trajectories=16", "--set=points=12"),
    "dode": (*DISTILL, "--method=dode", "--trajectories=32", "--set=scale=3"),
    "auto": (*DISTILL, "--budget=6000calls"),
    "sample": ("sample", *TINY, "--method=ddim", "--nfe=5", "--seeds=0-15"),
    "evaluate": ("evaluate", *TINY, "--method=ddim", "--nfe=3", "--samples=16", *SIZES),
    "record": (
        "evaluate", "--record", *TINY, "--nfe=3", "--full-nfe=3", "--samples=8",
        "--screen-samples=4", "--exact-samples=8", "--shortlist=2", "--finalists=1", *SIZES,
    ),
    "compare": (
        "compare", *TINY, "--nfe=3", "--methods=free_table,dode", "--budget=6000", "--samples=8",
        "--exact-samples=6", "--screen-samples=2", *SIZES,
    ),
    "export": ("export", *TINY, "--method=ddim", "--nfe=3", "--batch=1"),
}  # fmt: skip
"""Short forms of the commands that leave something behind."""


def arguments(name: str, folder: Path, again: bool) -> list[str]:
    words = list(COMMANDS[name])
    if words[0] in ("evaluate", "compare"):
        return [*words, "--folder", str(folder)]
    suffix = ".pt2" if name == "export" else ".safetensors"
    words += ["--output", str(folder / f"made{suffix}")]
    if words[0] == "distill":
        return [*words, *(["--resume", "--overwrite"] if again else [])]
    return [*words, *(["--overwrite"] if again and name == "export" else [])]


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


def started(work: Callable[[], None]) -> int:
    """The number of a child that does it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def forked(work: Callable[[], None], die_after: float | None) -> tuple[bool, float]:
    """(whether it was killed, seconds); a child that fails by itself ends this program."""
    began = time.monotonic()
    pid = started(work)
    end = None if die_after is None else began + die_after
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
    return code != 0, time.monotonic() - began


def timeless(value: Any) -> Any:
    """JSON without what the clock gives."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k != "folder"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Tensors as bytes, JSON without times and what packages sample; nothing partial."""
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
        elif path.suffix == ".pt2":
            from cli_model import SHAPE

            package = torch._inductor.aoti_load_package(str(path))
            held[name] = package(torch.ones(1, *SHAPE)).numpy().tobytes()
    return held


def uninterrupted(names: Iterable[str], base: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What each command leaves, and the seconds that it takes in a child."""
    whole, seconds = {}, {}
    for name in names:
        folder, timed = base / "whole" / name, base / "timed" / name
        folder.mkdir(parents=True)
        timed.mkdir(parents=True)
        command(name, folder, False)()  # here, so that the children have imported everything
        whole[name] = contents(folder)
        _, seconds[name] = forked(command(name, timed, False), None)
        if contents(timed) != whole[name]:
            raise SystemExit(f"{name} leaves something else the second time")
    print(f"seconds uninterrupted: {seconds}", file=sys.stderr)
    return whole, seconds


def kills(count: int, names: Iterable[str] = COMMANDS) -> dict[str, Any]:
    torch.set_num_threads(1)
    rng, killed, different = random.Random(0), Counter[str](), []
    names = list(names)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        whole, seconds = uninterrupted(names, base)
        trial = 0
        while killed.total() < count or trial < len(names):  # each command at least once
            name = names[trial % len(names)]
            folder = base / "made" / "out"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            again = False
            for _ in range(rng.randint(1, 4)):
                died, took = forked(command(name, folder, again), rng.uniform(0, seconds[name]))
                killed[name] += died
                if not died and not again:  # faster than it was: other work on this machine ended
                    seconds[name] = took
                again = True
            forked(command(name, folder, again), None)
            found = contents(folder)
            if found != whole[name]:
                parts = found.keys() | whole[name].keys()
                first = sorted(k for k in parts if found.get(k) != whole[name].get(k))[:3]
                different.append({"command": name, "trial": trial, "parts": first})
                print(different[-1], file=sys.stderr)
            trial += 1
            print(f"{killed.total()} kills, {len(different)} different", file=sys.stderr)
    return {"kills": killed.total(), "of": dict(killed), "runs": trial, "different": different}


SHARING = ("compare", "record", "evaluate")
"""Commands that keep what they compute in a folder, for the next run."""


def pairs(count: int, names: Iterable[str] = SHARING) -> dict[str, Any]:
    """Two processes at once with one folder: both end well and leave what one leaves alone."""
    torch.set_num_threads(1)
    names, different, died = list(names), [], 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, _ = uninterrupted(names, Path(temporary))
        for trial in range(count):
            name, folder = names[trial % len(names)], Path(temporary, f"pair-{trial}")
            folder.mkdir()
            both = [started(command(name, folder, False)) for _ in range(2)]
            died += sum(os.waitpid(pid, 0)[1] != 0 for pid in both)
            if contents(folder) != whole[name]:
                different.append({"command": name, "trial": trial})
            print(f"{trial + 1} pairs, {died} died, {len(different)} different", file=sys.stderr)
    return {"pairs": count, "died": died, "different": different}

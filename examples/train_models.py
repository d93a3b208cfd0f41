"""Train the benchmark model and the emoji models at once, on one GPU, in a given time.

    python examples/train_models.py --cifar10 cifar10.tar.xz --emoji emoji64.tar --table emoji.csv \\
        --work runs/models --deliver delivered --seconds 430

Processes of their own decode the images, train ``cifar10-32``, ``emoji`` and ``emoji-flow``
(``timed_training.py``) and the two classifiers (``train_features.py``), and share the GPU; the emoji
models end early, and the benchmark model has the GPU to itself for the rest. A process that fails is
started again with less: without compilation, without the CUDA graph, without either. ``--deliver``
gets at most eight files, each below 15 MB and complete whenever the program is killed:

    cifar10-32.{0,1}.safetensors  emoji.safetensors  emoji-flow.safetensors
    cifar10-32-features.safetensors  emoji-features.safetensors  samples.png  log.tar.gz

Without ``--emoji`` or without ``--cifar10`` it trains the other alone; called again, it goes on.
``export_models.py`` makes models of the files. ``--rehearse`` runs all of it on the CPU with made-up
images and tiny networks; ``--trial --seconds 25`` shows on a GPU, with made-up images, that steps are
captured (``emoji``, ``cifar10-32``, without waiting for a compilation) and compiled (``emoji-flow``), and
how fast they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent
LESS: tuple[tuple[str, ...], ...] = (
    (),
    ("--no-compile",),
    ("--no-capture",),
    ("--no-capture", "--no-compile"),
)
"""What each further attempt of a training leaves out."""
CLOSING = 25.0
"""Seconds kept at the end for the samples and the picture of all models; 6 in a trial."""
SHORTEST = 25.0
"""Seconds under which nothing is started again; 5 in a trial."""
TINY = {
    "network": {"size": 32, "channels": [8, 8, 16], "layers": 1, "attention": [2], "head": 8,
                "groups": 4, "patch": 1},
    "batch": 8,
}  # fmt: skip


class Task:
    """A process that is started when its inputs are there, and again with less when it fails.

    Args:
        command: of the arguments to add and the seconds left, the command line.
        until: seconds after the program's start at which it ends by itself.
        needs: files that must exist.
        attempts: arguments that each attempt adds.
        shortest: seconds under which it is not started.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[tuple[str, ...], float], list[str]],
        until: float,
        needs: list[Path],
        attempts: tuple[tuple[str, ...], ...] = ((),),
        shortest: float = 0.0,
    ) -> None:
        self.shortest = shortest
        self.name, self.command, self.until, self.needs = name, command, until, needs
        self.attempts = list(attempts)
        self.process: subprocess.Popen[bytes] | None = None
        self.done = False

    def look(self, seconds: float, logs: Path) -> None:
        """Starts it, or sees whether it has ended; ``seconds`` since the program's start."""
        if self.done or not all(path.exists() for path in self.needs):
            return
        if self.process is None:
            left = self.until - seconds
            if not self.attempts or left < self.shortest:
                self.say(seconds, "not started: no attempt or no time is left")
                self.done = True
                return
            added = self.attempts.pop(0)
            self.say(seconds, f"started for {left:.0f} s {' '.join(added)}")
            with (logs / f"{self.name}.log").open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(added, left), stdout=log, stderr=subprocess.STDOUT
                )
            return
        status = self.process.poll()
        if status is not None:
            self.say(seconds, f"ended with status {status}")
            self.process = None
            self.done = status == 0

    def say(self, seconds: float, what: str) -> None:
        print(f"[{seconds:6.1f}] {self.name}: {what}", flush=True)

    def stop(self) -> None:
        """Asks the process to save and end."""
        if self.process is not None:
            self.process.terminate()


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """Every process of the plan."""
    images, work, python = args.work / "images", args.work, sys.executable

    def script(name: str, *words: Any) -> list[str]:
        return [python, str(EXAMPLES / name), *map(str, words)]

    def decoding(name: str, *words: Any) -> Task:
        command = script("prepare_images.py", name, "--out", images, *words)
        return Task(f"{name}-images", lambda _added, _left: command, args.seconds, [])

    def training(name: str, source: str, until: float) -> Task:
        words = ["--model", name, "--images", images / f"{source}.npz", "--out", work / name]
        words += ["--deliver", args.deliver, "--save-every", args.save_every]
        if args.rehearse:
            # Ten pictures a row and 18 Heun steps are a minute here.
            words += ["--samples", 1, "--change", json.dumps(TINY)]
        attempts = LESS[3:] if args.rehearse else LESS
        if args.trial:
            words += ["--samples", 2]
            attempts = ((),) if name == "emoji-flow" else (("--no-compile",),)
        return Task(
            name,
            lambda added, left: script("timed_training.py", *words, "--seconds", left, *added),
            until,
            [images / f"{source}.npz"],
            attempts,
            5.0 if args.trial or args.rehearse else SHORTEST,
        )

    def classifier(name: str) -> Task:
        words = ["--preset", name, "--data", images / f"{name}.npz"]
        words += ["--out", work / f"{name}-features", "--deliver", args.deliver]
        if args.rehearse:
            words += ["--widths", "4,6,8", "--epochs", "2", "--batch", "16"]
        return Task(
            f"{name}-features",
            lambda added, _left: script("train_features.py", *words, *added),
            args.seconds,
            [images / f"{name}.npz"],
            # Without waiting for a compilation it trains while the others compile.
            (("--no-compile",),),
        )

    # On a busy CPU the pictures of a rehearsal take longer than its training.
    closing = 6.0 if args.trial else args.seconds / 2 if args.rehearse else CLOSING
    end = args.seconds - closing
    tasks = []
    if args.emoji is not None:
        tasks.append(decoding("emoji", "--data", args.emoji, "--table", args.table))
        for name in ("emoji", "emoji-flow"):
            tasks.append(training(name, "emoji", min(end, args.emoji_until)))
        tasks.append(classifier("emoji"))
    if args.cifar10 is not None:
        tasks.append(decoding("cifar10-32", "--data", args.cifar10))
        tasks += [training("cifar10-32", "cifar10-32", end), classifier("cifar10-32")]

    def wanted(task: Task) -> bool:
        if (args.deliver / f"{task.name}.safetensors").exists() and "features" in task.name:
            return False  # an earlier call has trained it
        return not args.only or task.name in args.only or task.name.endswith("-images")

    return [task for task in tasks if wanted(task)]


def gather(args: argparse.Namespace) -> None:
    """The logs, loss curves and the pictures in one archive, and one picture of all models."""
    fresh = args.work / "log.tar.gz"
    with tarfile.open(fresh, "w:gz") as archive:
        for path in [*args.work.glob("logs/*.log"), *args.work.glob("*/loss.png")]:
            archive.add(path, str(path.relative_to(args.work)))
    deliver(fresh, args.deliver / "log.tar.gz")
    pictures = [args.work / n / "samples.png" for n in ("cifar10-32", "emoji", "emoji-flow")]
    present = [path for path in pictures if path.exists()]
    if present:
        stack(present, args.work / "samples.png")
        deliver(args.work / "samples.png", args.deliver / "samples.png")


def stack(paths: list[Path], target: Path) -> None:
    """The pictures one below the other."""
    from PIL import Image

    images = []
    for path in paths:
        with Image.open(path) as opened:
            images.append(opened.convert("RGB"))
    width, height = max(i.width for i in images), sum(i.height + 8 for i in images)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + 8
    whole.save(target)


def deliver(source: Path, target: Path) -> None:
    """Copies beside the target, then replaces it: a reader never sees half a file."""
    beside = target.with_name("." + target.name)
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def pack_cache(args: argparse.Namespace) -> None:
    """What torch.compile has made, for another call on the same kind of GPU, if it is small."""
    fresh = args.work / "inductor.tar.xz"
    with tarfile.open(fresh, "w:xz", preset=3) as archive:
        archive.add(args.work / "inductor", "inductor")
    size = fresh.stat().st_size
    print(f"compiled code: {size:,} bytes packed", flush=True)
    if size < 16 * 2**20:
        deliver(fresh, args.deliver / "inductor.tar.xz")


def run(args: argparse.Namespace) -> int:
    """Everything; 0 when every task ended well."""
    began = time.monotonic()
    for folder in (args.work / "logs", args.work / "inductor", args.deliver):
        folder.mkdir(parents=True, exist_ok=True)
    if args.cache is not None and args.cache.exists():
        with tarfile.open(args.cache) as archive:
            archive.extractall(args.work, filter="data")
    os.environ |= {
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str((args.work / "inductor").resolve()),
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
        "OMP_NUM_THREADS": "1" if args.rehearse else "2",
    }
    tasks = make_tasks(args)
    gathered = began
    while not all(task.done for task in tasks):
        seconds = time.monotonic() - began
        for task in tasks:
            task.look(seconds, args.work / "logs")
        if time.monotonic() - gathered > 45:
            gather(args)
            gathered = time.monotonic()
        if seconds > args.seconds - 4:
            for task in tasks:
                task.stop()
            time.sleep(2)  # for their last delivery
            break
        time.sleep(0.25)
    gather(args)
    if args.pack_cache:
        pack_cache(args)
    for path in sorted(args.work.glob("logs/*.log")):
        lines = [line[:300] for line in path.read_text().splitlines()]
        print(f"== {path.stem}\n" + "\n".join(lines[-6:]), flush=True)
    bad = [task.name for task in tasks if not task.done or task.process is not None]
    print(f"finished after {time.monotonic() - began:.1f} s" + (f"; not: {bad}" if bad else ""))
    return 1 if bad else 0


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="folder or tar of train/CLASS, test/CLASS")
    parser.add_argument("--emoji", type=Path, help="tar of CODEPOINTS.png")
    parser.add_argument("--table", type=Path, help="CSV of the emoji's categories")
    parser.add_argument("--work", type=Path, default=Path("runs/models"))
    parser.add_argument("--deliver", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=430.0, help="of the whole program")
    parser.add_argument("--emoji-until", type=float, default=190.0, help="end of their training")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--only", nargs="+", help="names of the processes to run")
    parser.add_argument("--cache", type=Path, help="compiled code of an earlier --pack-cache")
    parser.add_argument("--pack-cache", action="store_true", help="deliver the compiled code, too")
    parser.add_argument("--trial", action="store_true", help="a short look at the speed on a GPU")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, made-up images")
    given = parser.parse_args(words)
    if given.trial:
        given.only = given.only or ["emoji", "emoji-flow", "cifar10-32"]
    if given.rehearse or given.trial:
        from made_up_images import make

        given.cifar10, given.emoji, given.table = make(given.work / "made-up")
    elif given.cifar10 is None and given.emoji is None:
        parser.error("--cifar10, --emoji or both are needed (or --rehearse)")
    elif (given.emoji is None) != (given.table is None):
        parser.error("--emoji and --table go together")
    return given


if __name__ == "__main__":
    raise SystemExit(run(arguments()))

"""Distils on the analytic mixture; started by ``test_parallel`` alone and under torchrun.

    parallel_run.py FOLDER METHOD... [--resume] [--die K]

``--die K`` has the last rank kill itself in its K-th call of the network, once: not when torchrun has
started it again. ``FOLDER/METHOD.calls`` is the number of calls a method took.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mixture_network import mixture_denoiser

from dlms_engine.learners import distill
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.support.parallel import World, finish, initialise, restarted

TRAINED = {
    "trajectories": 96, "batch": 24, "validation_samples": 8, "validation_steps": 16,
    "validate_every": 0, "checkpoint_seconds": 0.0,
}  # fmt: skip
LEARNED = {"keep": "learned"}  # so few updates may end behind a base, which is the same in any case
SETTINGS: dict[str, dict[str, Any]] = {
    "dlms": {**TRAINED, "lr": 1e-3, "grid": "polynomial", "endpoint_share": 0.0},
    # a logarithm of batch means: not a mean of the ranks' losses
    "dlms-endpoint": {**TRAINED, "lr": 1e-3, "grid": "polynomial", "endpoint_share": 0.5,
                      "last_step": "bottleneck", "endpoint_steps": 8, "ema_kimg": []},
    "amed": {**TRAINED, **LEARNED, "lr": 1e-3, "solver": "amed", "endpoint_share": 0.0},
    "free_table": {**TRAINED, **LEARNED, "lr": 1e-3, "teacher_steps": 12, "base": "ipndm"},
    "ld3": {**LEARNED, "trajectories": 6, "validation": 4, "rounds": 0, "rounds_times": 3, "loss": "l2",
            "teacher_nfe": 12, "radius": 0.05, "batch": 2, "student": "ipndm", "lr_times": 0.5},
    "ld3-best": {**LEARNED, "trajectories": 3, "validation": 3, "rounds": 1, "rounds_times": 0,
                 "loss": "l2", "teacher_nfe": 12, "radius": 0.05, "batch": 2, "init": "best"},
    "dode": {**LEARNED, "trajectories": 15, "solver": "ipndm", "grid": "polynomial"},
    "gits": {"trajectories": 15, "solver": "ipndm", "points": 21, "gamma": [1.1, 1.2], "batch": 4},
}  # fmt: skip


class Calls:
    """Counts the evaluations of all denoisers; ends the last rank without a word in one of them."""

    def __init__(self, folder: Path, fatal: int) -> None:
        self.folder, self.fatal, self.count = folder, fatal, 0
        self._original = Denoiser.predict
        calls = self

        def predict(self: Denoiser, *args: Any, **kwargs: Any) -> Any:
            calls.tick()
            return calls._original(self, *args, **kwargs)

        Denoiser.predict = predict  # type: ignore[method-assign]

    def tick(self) -> None:
        self.count += 1
        world = World.current()
        if self.count == self.fatal and world.rank == world.size - 1:
            held = [path.name for path in self.folder.glob("*.checkpoint.safetensors")]
            (self.folder / "died").write_text(" ".join(held))
            os.kill(os.getpid(), signal.SIGKILL)

    def report(self, name: str) -> None:
        if World.current().rank == 0:
            (self.folder / f"{name}.calls").write_text(str(self.count))
        self.count = 0


def main(words: list[str]) -> None:
    resume, fatal = "--resume" in words, 0
    if "--die" in words:
        at = words.index("--die")
        fatal = 0 if restarted() else int(words[at + 1])
        del words[at : at + 2]
    first, *methods = (word for word in words if not word.startswith("--"))
    folder = Path(first)
    calls = Calls(folder, fatal)
    for name in methods:
        method = name.partition("-")[0]
        distill(
            mixture_denoiser(), method, nfe=4, shape=(16,), progress=False, resume=resume,
            output=folder / f"{name}.safetensors", **SETTINGS[name],
        )  # fmt: skip
        calls.report(name)


if __name__ == "__main__":
    initialise()
    main(sys.argv[1:])
    finish()

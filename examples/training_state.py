"""What a training run keeps between calls, as one safetensors file, and its loss curve."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


class State:
    """Everything a resumed run needs: network, EMA copy, Adam moments, step and loss history.

    ``images`` is the length of the run in images and ``cooldown`` over how many of its last ones the
    learning rate falls; both are kept because ``--finish`` chooses them while running.
    """

    def __init__(
        self, network: nn.Module, ema: nn.Module, peak: float, images: int, cooldown: int
    ) -> None:
        self.network, self.ema, self.step = network, ema, 0
        self.images, self.cooldown, self.final = images, cooldown, False
        self.history: list[tuple[int, float]] = []  # (images seen, mean loss since the last)
        self.unrecorded: list[float] = []  # losses since the last record
        self.seconds = 0.0
        self.optimizer = torch.optim.Adam(network.parameters(), peak, betas=(0.9, 0.99), fused=True)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """One safetensors file holding tensors and, as metadata, the json state: one atomic
        ``os.replace`` keeps the two from ever disagreeing."""
        tensors = {f"net.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slot.items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        record = {
            "step": self.step,
            "history": self.history,
            "unrecorded": self.unrecorded,
            "seconds": self.seconds,
            "images": self.images,
            "cooldown": self.cooldown,
            "final": self.final,
            "hardware": hardware(next(self.network.parameters()).device),
            **facts,
        }
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"state": json.dumps(record)})
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)

    def load(self, path: Path, facts: dict[str, Any]) -> None:
        """Restores what ``save`` wrote.

        Raises:
            ValueError: it was written with other facts.
        """
        record = stored_state(path)
        changed = {k: (record.get(k), v) for k, v in facts.items() if record.get(k) != v}
        if changed:
            raise ValueError(f"{path} was written with other settings (stored, given): {changed}")
        part: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("net", "ema", "adam")}
        for key, value in load_file(path).items():
            head, _, rest = key.partition(".")
            part[head][rest] = value
        self.network.load_state_dict(part["net"])
        self.ema.load_state_dict(part["ema"])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        trained = list(self.network.parameters())
        for key, value in part["adam"].items():
            index, _, name = key.partition(".")
            if name != "step":
                # The fused Adam walks raw memory: moments must be laid out as their parameter is.
                value = torch.empty_like(trained[int(index)]).copy_(value)
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.seconds = record["step"], record["seconds"]
        self.images, self.cooldown = record["images"], record["cooldown"]
        self.final, self.unrecorded = record["final"], record["unrecorded"]
        self.history = [(int(a), float(b)) for a, b in record["history"]]


def stored_state(path: Path) -> dict[str, Any]:
    """The json part of a checkpoint."""
    with safe_open(path, "pt") as handle:
        record: dict[str, Any] = json.loads(handle.metadata()["state"])
    return record


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def plot_loss(history: list[tuple[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot([a / 1e6 for a, _ in history], [b for _, b in history], linewidth=0.8)
    axis.set(xlabel="images seen (millions)", ylabel="EDM loss", yscale="log")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)

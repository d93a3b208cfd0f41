"""What a timed training run keeps between calls, as one safetensors file."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_state import hardware, plot_loss

__all__ = ["State", "hardware", "plot_loss"]


class State:
    """Network, averaged copy, Adam, its learning rate as a tensor, and the random draws' state.

    Args:
        network: on its device.
        peak: learning rate; a captured step reads ``lr``, which is filled before each.
        path: the file.
    """

    def __init__(self, network: nn.Module, peak: float, path: Path) -> None:
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = copy.deepcopy(network).requires_grad_(False)
        self.path = path
        device = next(network.parameters()).device
        self.lr = torch.full((), peak, device=device)
        self.optimizer = torch.optim.Adam(
            network.parameters(),
            self.lr,
            betas=(0.9, 0.99),
            fused=True,
            capturable=device.type == "cuda",
        )
        self.step, self.seconds = 0, 0.0
        self.history: list[tuple[int, float]] = []  # (images seen, mean loss since the last)

    def average(self, half_life: float, images: int) -> None:
        """Moves the averaged weights on by ``images``; both counts in images seen."""
        weight = 1 - 0.5 ** (images / max(half_life, 1.0))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), weight)

    def record(self, total: Tensor, steps: int, batch: int) -> None:
        """Moves a sum of losses into the history.

        Raises:
            FloatingPointError: it is not finite; the last saved state is from before.
        """
        mean = float(total) / steps
        total.zero_()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} after {self.step} steps")
        self.history.append((self.step * batch, mean))

    def recent_loss(self) -> float | None:
        """Mean of the last ten records, since one is noisy; None before the first."""
        last = [loss for _, loss in self.history[-10:]]
        return sum(last) / len(last) if last else None

    # -- the file ---------------------------------------------------------------------------

    def _draws(self) -> Tensor:
        device = self.lr.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def _set_draws(self, draws: Tensor) -> None:
        if self.lr.device.type == "cuda":
            torch.cuda.set_rng_state(draws, self.lr.device)
        else:
            torch.set_rng_state(draws)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but counters and the history."""
        tensors = {f"net.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slot.items()}
        return {**tensors, "draws": self._draws()}

    def save(self, facts: dict[str, Any]) -> None:
        """One atomic replacement: tensors and, as metadata, counters, history and ``facts``."""
        kept = {k: v.detach().cpu().contiguous() for k, v in self.tensors().items()}
        record = {"step": self.step, "seconds": self.seconds, "history": self.history, **facts}
        temporary = self.path.with_suffix(".tmp")
        save_file(kept, temporary, metadata={"state": json.dumps(record)})
        os.replace(temporary, self.path)

    def load(self, facts: dict[str, Any]) -> None:
        """Restores what ``save`` wrote, if anything.

        Raises:
            ValueError: it was written with other facts.
        """
        if not self.path.exists():
            return
        with safe_open(self.path, "pt") as opened:
            record: dict[str, Any] = json.loads(opened.metadata()["state"])
        expected = json.loads(json.dumps(facts))
        changed = {k: (record.get(k), v) for k, v in expected.items() if record.get(k) != v}
        if changed:
            raise ValueError(f"{self.path} was written with other settings (it, now): {changed}")
        self.restore(load_file(self.path))
        self.step, self.seconds = record["step"], record["seconds"]
        self.history = [(int(a), float(b)) for a, b in record["history"]]

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Copies ``tensors`` into the existing ones, whose addresses a captured step holds."""
        parameters = list(self.network.parameters())
        own = self.tensors()
        if "adam.0.exp_avg" not in own and "adam.0.exp_avg" in tensors:
            self._make_moments(parameters)
            own = self.tensors()
        with torch.no_grad():
            for name, value in own.items():
                if name in tensors:
                    value.copy_(tensors[name])
                elif name.startswith("adam."):
                    value.zero_()
        self._set_draws(tensors["draws"].cpu())

    def _make_moments(self, parameters: list[nn.Parameter]) -> None:
        """Adam makes its moments at its first step; here they are needed before."""
        where = self.lr.device if self.lr.device.type == "cuda" else torch.device("cpu")
        for parameter in parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=where),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def copied(self) -> dict[str, Tensor]:
        """A copy that ``restore`` takes back."""
        return {name: value.detach().clone() for name, value in self.tensors().items()}

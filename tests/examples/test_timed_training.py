"""Training in a given time: it ends when it should, goes on where it stopped, and delivers."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytest.importorskip("tqdm")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NETWORK = {
    "size": 8, "channels": [4, 8], "layers": 1, "attention": [1], "patch": 1, "head": 4,
    "groups": 4,
}  # fmt: skip
CHANGE = {"network": NETWORK, "batch": 4, "warmup": 4}


@pytest.fixture
def trainer(example: Callable[[str], Any]) -> Any:
    return example("timed_training")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images of three classes at twice the network's size."""
    generator = np.random.default_rng(0)
    path = tmp_path / "emoji.npz"
    np.savez(
        path,
        images=generator.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8),
        labels=np.arange(12) % 3,
        classes=np.array(["a", "b", "c"]),
        flip=np.arange(12) % 2 == 0,
    )
    return path


def ticking() -> Callable[[], float]:
    """A clock on which every look takes a second."""
    ticks = iter(range(10**6))
    return lambda: float(next(ticks))


def call(
    trainer: Any, images: Path, out: Path, seconds: float, *words: str, **change: Any
) -> argparse.Namespace:
    given = ["--model", "emoji", "--images", str(images), "--out", str(out), "--device", "cpu"]
    given += ["--seconds", str(seconds), "--no-compile", "--samples", "0", "--save-every", "1e9"]
    given += ["--change", json.dumps({**CHANGE, **change}), *words]
    args: argparse.Namespace = trainer.arguments(given)
    return args


@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
def test_it_ends_in_time_and_delivers_the_average(
    model: str, trainer: Any, images: Path, tmp_path: Path
) -> None:
    words = ("--model", model, "--deliver", str(tmp_path / "delivered"))
    summary = trainer.train(call(trainer, images, tmp_path / "run", 61, *words), ticking())
    assert 20 <= summary["step"] <= 30  # two or three looks at the clock a step
    assert summary["learning_rate"] < 2e-4  # of 2e-3
    delivered = tmp_path / "delivered" / f"{model}.safetensors"
    weights = load_file(delivered)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    stored = load_file(tmp_path / "run" / "state.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, stored[f"ema.{name}"].bfloat16())
    assert not torch.equal(stored["ema.conv_in.weight"], stored["net.conv_in.weight"])
    with safe_open(delivered, "pt") as opened:
        facts = json.loads(opened.metadata()["training"])
    assert facts["config"] == {**facts["recipe"]["network"], "classes": 3}
    assert facts["images_seen"] == 4 * facts["step"] and facts["parts"] == 1


def test_a_stopped_run_goes_on_to_the_bit(
    trainer: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 1e-3)
    steps: list[int] = []

    def run(out: str, stop: int) -> None:
        def step(self: Any) -> None:
            self.eager()
            if self.state.step + 1 == stop:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(trainer.Step, "__call__", step)
        steps.append(trainer.train(call(trainer, images, tmp_path / out, 1e9), ticking())["step"])

    run("whole", 9)
    run("broken", 4)
    early = load_file(tmp_path / "broken" / "state.safetensors")
    run("broken", 9)
    assert steps == [9, 4, 9]
    whole, again = (
        load_file(tmp_path / name / "state.safetensors") for name in ("whole", "broken")
    )
    assert whole.keys() == again.keys() and "adam.0.exp_avg" in whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(early["net.conv_in.weight"], whole["net.conv_in.weight"])
    # The planted fault: draws that do not go on where they stopped.
    run("off", 4)
    state = tmp_path / "off" / "state.safetensors"
    monkeypatch.setattr(
        "timed_state.State._set_draws", lambda _self, _draws: torch.manual_seed(12345)
    )
    run("off", 9)
    assert not torch.equal(load_file(state)["net.conv_in.weight"], whole["net.conv_in.weight"])


def test_another_recipe_is_refused(trainer: Any, images: Path, tmp_path: Path) -> None:
    trainer.train(call(trainer, images, tmp_path / "run", 9), ticking())
    with pytest.raises(ValueError, match="written with other settings.*recipe"):
        trainer.train(call(trainer, images, tmp_path / "run", 9, batch=5), ticking())


def test_a_capture_leaves_no_trace(trainer: Any, images: Path, tmp_path: Path) -> None:
    """The steps before a capture are undone: weights, moments and draws."""
    args = call(trainer, images, tmp_path / "run", 9)
    state, step, _, _ = trainer.prepare(args, {**trainer.TIMED["emoji"], **CHANGE})
    kept, weights = state.copied(), state.network.state_dict()
    addresses = {name: tensor.data_ptr() for name, tensor in weights.items()}
    before = torch.get_rng_state()
    for _ in range(3):
        step.eager()
    assert not torch.equal(weights["conv_in.weight"], kept["net.conv_in.weight"])
    state.restore(kept)
    for name, tensor in state.network.state_dict().items():
        assert torch.equal(tensor, kept[f"net.{name}"]), name
        assert tensor.data_ptr() == addresses[name]
    moments = state.optimizer.state_dict()["state"]
    assert moments and not any(float(v.abs().max()) for s in moments.values() for v in s.values())
    assert torch.equal(before, torch.get_rng_state())


def test_parts_stay_small_and_belong_together(
    trainer: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PART", 6_000)
    out = tmp_path / "delivered"
    args = call(trainer, images, tmp_path / "run", 9, "--deliver", str(out))
    summary = trainer.train(args, ticking())
    files = sorted(out.glob("emoji.*.safetensors"))
    assert len(files) == -(-2 * summary["parameters"] // 6_000)
    sizes = [sum(2 * t.numel() for t in load_file(file).values()) for file in files]
    assert sum(sizes) == 2 * summary["parameters"] and max(sizes) < 1.5 * 6_000
    assert sorted(path.name for path in out.iterdir()) == [file.name for file in files]


def test_targets_are_the_networks_own_quantities(trainer: Any) -> None:
    """A network that answers exactly has no loss; the definition of D checks EDM's target."""
    clean, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64).unbind(0)
    normal = torch.randn(4, dtype=torch.float64)
    recipe = trainer.TIMED["emoji"]
    level = (recipe["level_mean"] + recipe["level_std"] * normal).exp()[:, None, None, None]
    data = recipe["sigma_data"]
    skip = data**2 / (level**2 + data**2)
    out = level * data / (level**2 + data**2).sqrt()
    exact = (clean - skip * (clean + level * noise)) / out
    for fault, bound in ((0.0, 1e-12), (0.1, None)):
        loss = trainer.make_loss(recipe)(
            lambda _x, _c, _l, fault=fault: exact + fault, clean, noise, normal, None
        )
        assert float(loss) < 1e-12 if bound else float(loss) > 1e-3
    flow = trainer.make_loss(trainer.TIMED["emoji-flow"])
    assert float(flow(lambda _x, _t, _l: noise - clean, clean, noise, normal, None)) < 1e-12
    assert float(flow(lambda _x, _t, _l: clean - noise, clean, noise, normal, None)) > 1e-3


def test_moved_images_stay_on_white(trainer: Any) -> None:
    torch.manual_seed(0)
    white = torch.ones(8, 3, 16, 16)
    torch.testing.assert_close(trainer.moved(white, 0.5, 0.2), torch.ones(8, 3, 8, 8))
    dark = -white
    found = trainer.moved(dark, 0.5, 0.0)
    shares = (found < 0).double().mean((1, 2, 3))
    assert float(shares.min()) < 0.9 and float(shares.min()) > 0.2

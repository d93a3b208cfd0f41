"""The training example: a run that was interrupted ends exactly where an unbroken one does."""

from __future__ import annotations

import argparse
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BATCH, STEPS = 4, 6


@pytest.fixture
def trainer(example: Callable[[str], Any]) -> Any:
    return example("train_embedded")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Ten 32x32 PNGs in a tar.xz, as the data set comes."""
    generator = np.random.default_rng(0)
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for index in range(10):
            name = tmp_path / f"{index}.png"
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(name)
            tar.add(name, f"set/train/{'ab'[index % 2]}/{index}.png")
    return path


def arguments(archive: Path, out: Path, **changes: Any) -> argparse.Namespace:
    import train_embedded

    values: dict[str, Any] = {
        "images": BATCH * STEPS,
        "size": 8,
        "channels": "8,16",
        "batch": BATCH,
        "groups": 8,
        "lr": 1e-3,
        "warmup": 8,
        "ema_half_life": 10.0,
        "seed": 3,
        "save_every": 1e9,
        "grid_every": 1e9,
        "device": "cpu",
    }
    given = ["--data", str(archive), "--include", "/train/", "--out", str(out), "--no-compile"]
    if "preset" in changes:
        given += ["--preset", changes.pop("preset")]
    return argparse.Namespace(**(vars(train_embedded.arguments(given)) | values | changes))


def stored(path: Path) -> dict[str, Any]:
    import training_state

    found: dict[str, Any] = training_state.stored_state(path)
    return found


# the 32x32 recipe at a reduced width: augmentation, attention on a level, a constant rate
LARGE: dict[str, Any] = {"preset": "cifar10-32", "size": 16, "cooldown": 2 * BATCH, "head": 8}


def interrupting(trainer: Any, after: int) -> type:
    class Interrupting(trainer.tqdm):  # type: ignore[misc]
        def update(self, n: float = 1) -> None:
            super().update(n)
            if self.n == after * BATCH:
                os.kill(os.getpid(), signal.SIGINT)

    return Interrupting


@pytest.mark.parametrize("changes", [{}, slow(LARGE)], ids=["embedded", "cifar10-32"])
def test_interrupted_run_resumes_bit_exactly(
    changes: dict[str, Any],
    trainer: Any,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer.train(arguments(archive, tmp_path / "whole", **changes))
    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "tqdm", interrupting(trainer, 3))
        trainer.train(arguments(archive, out, **changes))
    early = load_file(out / "checkpoint.safetensors")
    trainer.train(arguments(archive, out, **changes))

    whole = load_file(tmp_path / "whole" / "checkpoint.safetensors")
    resumed = load_file(out / "checkpoint.safetensors")
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("adam.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert not torch.equal(early["net.conv_in.weight"], whole["net.conv_in.weight"])
    assert not torch.equal(whole["ema.conv_in.weight"], whole["net.conv_in.weight"])
    assert ("net.augment.weight" in whole) == bool(changes)
    states = [stored(tmp_path / n / "checkpoint.safetensors") for n in ("whole", "broken")]
    assert states[0]["history"] == states[1]["history"]
    assert (out / f"samples_{BATCH * STEPS:08d}.png").exists()
    assert (out / "loss.png").exists()


@pytest.mark.slow
def test_a_lost_step_is_seen(trainer: Any, archive: Path, tmp_path: Path) -> None:
    """The planted fault of the test above: draws that are not a function of the step."""
    trainer.train(arguments(archive, tmp_path / "whole", **LARGE))
    original = trainer.Batches.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer.Batches, "__call__", lambda self, step: original(self, max(0, step - 1))
        )
        trainer.train(arguments(archive, tmp_path / "off", **LARGE))
    one, other = (load_file(tmp_path / n / "checkpoint.safetensors") for n in ("whole", "off"))
    assert not torch.equal(one["net.conv_in.weight"], other["net.conv_in.weight"])


@pytest.mark.slow
def test_minutes_stop_with_a_checkpoint(trainer: Any, archive: Path, tmp_path: Path) -> None:
    args = arguments(archive, tmp_path / "run", minutes=0.0, **LARGE)
    trainer.train(args)
    state = stored(tmp_path / "run" / "checkpoint.safetensors")
    assert (state["step"], len(state["unrecorded"]), state["final"]) == (1, 1, False)
    trainer.train(args)
    assert stored(tmp_path / "run" / "checkpoint.safetensors")["step"] == 2


@pytest.mark.slow
def test_finish_ends_the_run_in_the_time_and_keeps_its_length(
    trainer: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))  # a second a look: the speed and the end are then known
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(trainer, "RECORD_EVERY", 2)
    changes: dict[str, Any] = {**LARGE, "images": 10**9, "cooldown": 8 * BATCH, "probe": 4}
    trainer.train(arguments(archive, tmp_path / "run", minutes=2.0, finish=True, **changes))
    state = stored(tmp_path / "run" / "checkpoint.safetensors")
    assert state["final"] and state["images"] == state["step"] * BATCH < 10**9
    assert 0 < state["cooldown"] <= 8 * BATCH
    assert 4 < state["step"] < 120
    trainer.train(arguments(archive, tmp_path / "run", **changes))  # nothing is left to do
    again = stored(tmp_path / "run" / "checkpoint.safetensors")
    assert again["step"] == state["step"]
    with pytest.raises(ValueError, match="--finish needs --minutes"):
        trainer.train(arguments(archive, tmp_path / "run", finish=True, **changes))


def test_learning_rate_rises_stays_and_falls(trainer: Any) -> None:
    rate = [
        trainer.learning_rate(seen, 1000, 2.0, 100, 200) for seen in (0, 50, 100, 800, 900, 1000)
    ]
    assert rate == [0.0, 1.0, 2.0, 2.0, 1.0, 0.0]
    cosine = [trainer.learning_rate(seen, 1100, 2.0, 100, 0) for seen in (0, 100, 600, 1100)]
    assert cosine == pytest.approx([0.0, 2.0, 1.0, 0.0])


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(
    trainer: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "RECORD_EVERY", 2)
    original = trainer.denoise
    monkeypatch.setattr(trainer, "denoise", lambda *given: original(*given) * float("nan"))
    with pytest.raises(FloatingPointError, match="lower --lr"):
        trainer.train(arguments(archive, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_zero_labels_are_the_plain_network(trainer: Any) -> None:
    from edm_network import build_network, denoise

    torch.manual_seed(0)
    config = {**vars(arguments(Path("x"), Path("y"), **LARGE))}
    labelled, plain = build_network(config, labels=True), build_network(config)
    torch.nn.init.normal_(labelled.conv_out.weight, std=0.1)  # type: ignore[arg-type]
    weights = labelled.state_dict()
    plain.load_state_dict({k: v for k, v in weights.items() if not k.startswith("augment")})
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        assert torch.equal(denoise(labelled, x, sigma), denoise(plain, x, sigma))
        told = denoise(labelled, x, sigma, torch.ones(2, 9))
    assert not torch.equal(told, denoise(plain, x, sigma))


def test_resuming_with_other_settings_is_refused(
    trainer: Any, archive: Path, tmp_path: Path
) -> None:
    trainer.train(arguments(archive, tmp_path / "run", images=BATCH))
    with pytest.raises(ValueError, match="lr"):
        trainer.train(arguments(archive, tmp_path / "run", images=BATCH, lr=2e-3))
    with pytest.raises(ValueError, match="images"):
        trainer.train(arguments(archive, tmp_path / "run", images=2 * BATCH))


def test_images_are_box_averaged_and_labelled(trainer: Any, archive: Path, tmp_path: Path) -> None:
    images, labels, classes = trainer.load_images(archive, 16, "/train/", tmp_path / "c.npz")
    with Image.open(tmp_path / "0.png") as first:
        pixels = np.asarray(first, dtype=float).reshape(16, 2, 16, 2, 3).mean((1, 3))
    # Pillow rounds after each of its two passes: up to one level.
    assert np.abs(images[0] - pixels).max() <= 1.0
    assert (classes, labels.tolist()) == (["a", "b"], [0, 1] * 5)
    again, _, _ = trainer.load_images(archive, 16, "/train/", tmp_path / "c.npz")
    assert np.array_equal(images, again)
    with pytest.raises(ValueError, match="/test/"):
        trainer.load_images(archive, 16, "/test/")

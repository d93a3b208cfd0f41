"""The training example: a run that was interrupted ends exactly where an unbroken one does."""

from __future__ import annotations

import argparse
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BATCH, STEPS = 4, 6


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import train_embedded

    yield train_embedded
    for number, handler in before.items():  # train() installs its own
        signal.signal(number, handler)


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
    values: dict[str, Any] = {
        "data": archive,
        "include": "/train/",
        "out": out,
        "images": BATCH * STEPS,
        "size": 8,
        "channels": "8,16",
        "batch": BATCH,
        "lr": 1e-3,
        "warmup": 8,
        "ema_half_life": 10.0,
        "seed": 3,
        "save_every": 1e9,
        "grid_every": 1e9,
        "compile": False,
    }
    return argparse.Namespace(**(values | changes))


def test_interrupted_run_resumes_bit_exactly(
    trainer: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.train(arguments(archive, tmp_path / "whole"))

    class Interrupting(trainer.tqdm):  # type: ignore[misc]
        def update(self, n: float = 1) -> None:
            super().update(n)
            if self.n == 3 * BATCH:
                os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "tqdm", Interrupting)
        trainer.train(arguments(archive, out))
    early = load_file(out / "checkpoint.safetensors")
    trainer.train(arguments(archive, out))

    whole = load_file(tmp_path / "whole" / "checkpoint.safetensors")
    resumed = load_file(out / "checkpoint.safetensors")
    assert whole.keys() == resumed.keys()
    assert any(name.startswith("adam.") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert not torch.equal(early["net.conv_in.weight"], whole["net.conv_in.weight"])
    assert not torch.equal(whole["ema.conv_in.weight"], whole["net.conv_in.weight"])
    assert (out / f"samples_{BATCH * STEPS:08d}.png").exists()


def test_resuming_with_other_settings_is_refused(
    trainer: Any, archive: Path, tmp_path: Path
) -> None:
    trainer.train(arguments(archive, tmp_path / "run", images=BATCH))
    with pytest.raises(ValueError, match="lr"):
        trainer.train(arguments(archive, tmp_path / "run", images=BATCH, lr=2e-3))


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

"""The benchmark model from images to figures, at a reduced width: train, export, load, sample."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import complaint
from PIL import Image
from safetensors.torch import load_file, save_file

from dlms_engine.cli.model import load_model
from dlms_engine.lab import benchmark_model
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
NAME = "cifar10-32"
TINY: dict[str, Any] = {
    "network": {"size": 32, "channels": [8, 8, 16], "layers": 1, "attention": [2], "head": 8,
                "groups": 4, "patch": 1},
    "batch": 8, "warmup": 8, "lr": 0.01,
}  # fmt: skip


def archive(path: Path) -> Path:
    """24 training and 8 test images of two classes: bright or dark noise."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(32):
            kind, label = ("train" if index < 24 else "test"), "ab"[index % 2]
            low = 160 if label == "b" else 0
            file = path.parent / f"{index}.png"
            pixels = generator.integers(low, low + 96, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            tar.add(file, f"set/{kind}/{label}/{index}.png")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for ``DLMS_MODELS``, written by the examples themselves."""
    root = tmp_path_factory.mktemp("made")
    data, out = archive(root / "images.tar"), root / "delivered"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import export_models
        import prepare_images
        import timed_training
        import train_features

        prepare_images.prepare(NAME, data, root)
        common = ["--device", "cpu", "--no-compile", "--deliver", str(out)]
        ticks = iter(range(10**6))
        words = ["--model", NAME, "--images", str(root / f"{NAME}.npz"), "--samples", "0"]
        words += ["--out", str(root / "run"), "--seconds", "61", "--change", json.dumps(TINY)]
        args = timed_training.arguments([*common, *words])
        timed_training.train(args, lambda: float(next(ticks)))
        line = f"--preset {NAME} --data {root}/{NAME}.npz --out {root}/features --widths 4,6,8"
        facts = train_features.train(
            train_features.arguments([*common, *f"{line} --batch 8 --epochs 10".split()])
        )
        assert facts["test_accuracy"] == 1.0  # bright or dark is easily told
        assert (facts["training_images"], facts["test_images"]) == (24, 8)
        export_models.export(out, NAME, root, draw=2)
    for number, handler in before.items():  # train() installs its own
        signal.signal(number, handler)
    yield root


@pytest.fixture
def exported(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DLMS_MODELS", str(made / "benchmarks" / "models"))
    monkeypatch.setenv("DLMS_MODEL_DEVICE", "cpu")
    return made


def test_files_say_what_they_are(exported: Path) -> None:
    folder = benchmark_model.model_folder(NAME)
    files = {*benchmark_model.FILES, "samples.png", "MODEL_CARD.md"}
    assert {path.name for path in folder.iterdir()} == files
    record = json.loads((folder / "provenance.json").read_text())
    assert record["model"]["images_seen"] == 8 * record["model"]["steps"] > 0
    assert record["data"]["name"] == "CIFAR-10" and record["data"]["licence"]
    assert record["features"]["reference_images"] == 24
    assert record["hardware"] and set(record["sha256"]) == {*benchmark_model.FILES[:4]}
    weights = load_file(folder / "network.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    trained = load_file(exported / "run" / "state.safetensors")
    assert f"ema.{next(iter(weights))}" in trained
    for name, tensor in weights.items():
        assert torch.equal(tensor, trained[f"ema.{name}"].bfloat16())
    card = (folder / "MODEL_CARD.md").read_text()
    assert "CIFAR-10" in card and f"{record['model']['images_seen']:,} images" in card


def test_denoiser_is_the_trained_one(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser's answer turned back into the raw output has the training's loss."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import timed_training

    model = benchmark_model.load_benchmark_model(NAME)
    recipe = timed_training.TIMED[NAME]
    clean, noise = torch.randn(2, 3, *model.shape, generator=torch.Generator().manual_seed(0))
    sigma, data = 1.5, recipe["sigma_data"]
    normal = torch.full((3,), (math.log(sigma) - recipe["level_mean"]) / recipe["level_std"])
    with pytest.MonkeyPatch.context() as patch:  # the trainer's own words, in float32
        patch.setattr(timed_training.torch, "autocast", lambda *_: torch.no_grad())
        unet = benchmark_model.load_unet(NAME)
        expected = timed_training.make_loss(recipe)(unet, clean, noise, normal, None)

    def loss(denoiser: Denoiser) -> float:
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        answer = denoiser(clean + sigma * noise, sigma)
        return float(weight * (answer - clean).square().mean())

    assert loss(model.denoiser) == pytest.approx(float(expected), rel=1e-5)
    assert model.denoiser.last_features.shape == (3, 64)
    assert float(model.denoiser.last_features.std()) > 0
    model.denoiser.sigma_data = 0.6  # the planted fault
    assert loss(model.denoiser) != pytest.approx(float(expected), rel=1e-3)


def test_reference_belongs_to_the_features(exported: Path) -> None:
    model = benchmark_model.load_benchmark_model(NAME)
    with np.load(exported / f"{NAME}.npz") as stored:
        pixels = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    features = model.features(pixels).double()
    assert model.reference.images == 24
    torch.testing.assert_close(features.mean(0), model.reference.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.T.cov(), model.reference.covariance, atol=1e-4, rtol=1e-4)
    assert float(model.reference.covariance.trace()) / 8 == pytest.approx(1.0, rel=0.02)


def test_dtypes_stay_inside_the_network(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wide = benchmark_model.load_benchmark_model(NAME).denoiser(x, 0.7)
    monkeypatch.setenv("DLMS_MODEL_DTYPE", "bfloat16")
    half = benchmark_model.load_benchmark_model(NAME)
    assert half.denoiser.network_dtype == torch.float32
    found = half.denoiser(x, 0.7)
    assert found.dtype == torch.float32
    assert half.denoiser.last_features.dtype == torch.float32
    assert not torch.equal(found, wide)
    torch.testing.assert_close(found, wide, atol=0.1, rtol=0.1)
    x.requires_grad_(True)
    traced = half.denoiser(x, 0.7)
    assert torch.equal(traced, benchmark_model.load_benchmark_model(NAME).denoiser(x, 0.7)), (
        "float32 where gradients run"
    )
    traced.sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert half.denoiser.last_features.requires_grad


@pytest.mark.slow
def test_compiled_network_is_the_same_and_gradients_go_around_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile's tracing alone (no code generation) sees the hook that keeps the bottleneck."""
    monkeypatch.setattr(benchmark_model, "COMPILED_FROM", 2)
    plain = benchmark_model.load_benchmark_model(NAME)
    network = plain.denoiser.network
    assert isinstance(network, benchmark_model.BenchmarkNetwork)
    calls = []
    compiled = torch.compile(network._both, backend="eager", fullgraph=True)
    fast = benchmark_model.BenchmarkNetwork(network.unet)
    fast._fast = lambda *given: (calls.append(1), compiled(*given))[1]
    denoiser = Denoiser(fast, EDM(), features="bottleneck")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(denoiser(x, 0.7), plain.denoiser(x, 0.7), atol=1e-5)
        assert torch.allclose(denoiser.last_features, plain.denoiser.last_features, atol=1e-5)
        denoiser(x[:1], 0.7)
    assert calls == [1], "a small batch is not worth compiling for"
    x.requires_grad_(True)
    denoiser(x, 0.7).sum().backward()
    assert calls == [1] and x.grad is not None and float(x.grad.abs().max()) > 0


@pytest.mark.needs_cuda
def test_on_a_gpu_samples_live_there(exported: Path) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    wide = benchmark_model.load_benchmark_model(NAME)
    there = benchmark_model.load_benchmark_model(NAME, "cuda")
    far = x.to(there.denoiser.device)
    found = there.denoiser(far, 0.7)
    assert found.device == far.device == there.features(far).device
    torch.testing.assert_close(found.cpu(), wide.denoiser(x, 0.7), atol=2e-2, rtol=2e-2)
    assert there.denoiser.last_features.device == far.device


def test_a_copy_is_independent(exported: Path) -> None:
    model = benchmark_model.load_benchmark_model(NAME)
    twin = copy.deepcopy(model.denoiser)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    twin(x, 2.0)
    with pytest.raises(RuntimeError, match="no bottleneck"):
        _ = model.denoiser.bottleneck


def dlms(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlms_engine", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.slow
def test_command_line_samples_and_evaluates(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    model = load_model(NAME)
    assert model.shape == (3, 32, 32) and model.features is not None
    picture = tmp_path / "s.png"
    done = dlms(
        "sample", "--model", NAME, "--nfe", "3", "--seeds", "0-3", "-o", str(picture)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert picture.exists()
    done = dlms(
        "evaluate", "--model", NAME, "--nfe", "3", "--samples", "12", "--exact-nfe", "6",
        "--accurate-nfe", "4", "--batch", "6", "--folder", str(tmp_path / "e"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 12
    assert all(np.isfinite(found[key]) for key in ("rmse", "to_accurate", "to_data"))


def test_without_the_files_the_message_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DLMS_MODELS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"scripts/gpu_record\.sh train export"):
        load_model(NAME)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="missing: network.safetensors"):
        benchmark_model.model_folder(NAME)
    assert "gpu_record.sh" in complaint(capsys, "sample", "--model", NAME)
    assert (ROOT / "scripts" / "gpu_record.sh").exists()


def test_what_cannot_be_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'emoji', .*'cifar10-32' or module:function"):
        load_model("cifar10-64")
    with pytest.raises(ValueError, match="expected one of cifar10-32"):
        benchmark_model.model_folder("cifar10-64")
    monkeypatch.setenv("DLMS_MODEL_DTYPE", "int8")
    with pytest.raises(ValueError, match="DLMS_MODEL_DTYPE is 'int8'"):
        benchmark_model.load_benchmark_model(NAME)
    monkeypatch.setenv("DLMS_MODEL_DEVICE", "tpu")
    with pytest.raises(ValueError, match="DLMS_MODEL_DEVICE is 'tpu'"):
        benchmark_model.load_benchmark_model(NAME)


def test_a_feature_file_of_another_network_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    for name in benchmark_model.FILES:
        (folder / name).write_bytes((exported / "benchmarks" / "models" / NAME / name).read_bytes())
    monkeypatch.setenv("DLMS_MODELS", str(tmp_path))
    weights = load_file(folder / "features.safetensors")
    save_file(weights, folder / "features.safetensors")
    with pytest.raises(ValueError, match="does not say its widths"):
        benchmark_model.load_benchmark_model(NAME)
    del weights["scale"]
    save_file(weights, folder / "features.safetensors", metadata={"widths": "4,6,8"})
    with pytest.raises(ValueError, match=r"missing \['scale'\]"):
        benchmark_model.load_benchmark_model(NAME)


def test_recipe_has_the_promised_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from recipes import CLASSIFIER, TIMED
    from train_features import build_features

    from dlms_engine.models.unet import UNet

    for name, bounds in (
        (NAME, (8e6, 20e6)),
        ("emoji", (1e6, 2.5e6)),
        ("emoji-flow", (1e6, 2.5e6)),
    ):
        unet = UNet(**TIMED[name]["network"], classes=11 if TIMED[name]["dropout"] else 0)
        kept: list[torch.Size] = []
        unet.mid_block.register_forward_hook(
            lambda _m, _i, output, kept=kept: kept.append(output.shape)
        )
        with torch.no_grad():
            unet(torch.zeros(1, 3, 32, 32), torch.zeros(1))
        assert kept[0][2:] == ((8, 8) if name == NAME else (4, 4))
        assert bounds[0] <= sum(p.numel() for p in unet.parameters()) <= bounds[1]
    network = UNet(**TIMED[NAME]["network"])
    features = build_features(CLASSIFIER[NAME]["widths"])
    together = sum(p.numel() for n in (network, features) for p in n.parameters())
    assert 2 * together + 8 * features.num_features**2 < 39e6  # with the pictures, at most 40 MB


def test_models_are_no_part_of_the_package() -> None:
    try:
        import tomllib
    except ImportError:
        pytest.skip("needs Python 3.11")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    packages = build["wheel"]["packages"].values()
    assert not any(path.startswith("benchmarks") for path in packages)
    assert "benchmarks/models/*/" in build["sdist"]["exclude"]

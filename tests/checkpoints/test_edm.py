"""EDM snapshots: read as data, never as code."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
import torch
from edm_files import EasyDict, Persistent, as_pickled, snapshot_bytes, writers  # noqa: F401
from torch import nn

from dlms_engine import grids, solvers
from dlms_engine.checkpoints.edm import convert, load_edm, read_snapshot
from dlms_engine.checkpoints.networks import DhariwalUNet, SongUNet
from dlms_engine.checkpoints.networks.blocks import Fourier
from dlms_engine.checkpoints.networks.song import encoded_times
from dlms_engine.checkpoints.restricted import UnsafeCheckpointError, read_pickle
from dlms_engine.engine.sampler import Sampler

SONG = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 4,
    "augment_dim": 9,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSN = {
    **SONG,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "label_dim": 0,
}
ADM = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 4,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
WEIGHT = torch.zeros(1, dtype=torch.bfloat16)
CASES = {"ddpm++": (SongUNet, SONG), "ncsn++": (SongUNet, NCSN), "adm": (DhariwalUNet, ADM)}


def make(case: str) -> tuple[nn.Module, dict[str, Any]]:
    kind, settings = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(**settings).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    return network, settings


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_snapshot_becomes_a_denoiser(case: str, tmp_path: Any) -> None:
    network, settings = make(case)
    path = tmp_path / "network.pkl"
    path.write_bytes(snapshot_bytes(network, settings))
    denoiser = load_edm(path, features="enc.4x4_block0")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.tensor([0.3, -1.0])
    labels = torch.tensor([1, 3]) if settings.get("label_dim") else None
    with torch.no_grad():
        expected = network(x, noise, labels)
        assert torch.equal(denoiser.network(x, noise, labels), expected)
    assert denoiser.process.config() == {"name": "edm", "t_min": 0.002, "t_max": 80.0}
    table = solvers.dpm_solver_pp(denoiser.process, grids.polynomial(denoiser.process, 3))
    cond = {} if labels is None else {"class_labels": labels}
    assert bool(Sampler(denoiser, table)(80 * x, **cond).isfinite().all())
    converted = convert(path, tmp_path / "network.safetensors")
    with torch.no_grad():
        assert torch.equal(load_edm(converted).network(x, noise, labels), expected)
    assert read_snapshot(converted).settings == dict(settings)


def as_numpy(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the training script leaves them: numbers of a data set's arrays are numpy's."""

    def number(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return np.int64(value) if isinstance(value, int) else np.float64(value)

    return {
        k: [number(v) for v in value] if isinstance(value, list) else number(value)
        for k, value in settings.items()
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_snapshots_hold_numpy_scalars_and_dtypes(
    case: str, protocol: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every snapshot written with the official code was refused for them."""
    network, settings = make(case)
    path = tmp_path / "network.pkl"
    dumps = pickle.dumps
    monkeypatch.setattr(pickle, "dumps", lambda value: dumps(value, protocol=protocol))
    raw = snapshot_bytes(network, as_numpy(settings))
    strings = [arg for _, arg, _ in pickletools.genops(raw) if isinstance(arg, str)]
    assert any("scalar" in text for text in strings) and any("dtype" in text for text in strings)
    path.write_bytes(raw)
    assert read_snapshot(path).settings == settings
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 3]) if settings.get("label_dim") else None
    with torch.no_grad():
        expected = network(x, torch.tensor([0.3, -1.0]), labels)
        assert torch.equal(load_edm(path).network(x, torch.tensor([0.3, -1.0]), labels), expected)


def test_published_sizes() -> None:
    """Parameters of the published CIFAR-10 and ImageNet-64 networks."""
    cifar = {
        "img_resolution": 32, "in_channels": 3, "out_channels": 3, "augment_dim": 9,
        "model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4,
    }  # fmt: skip
    imagenet = {
        "img_resolution": 64, "in_channels": 3, "out_channels": 3, "label_dim": 1000,
        "model_channels": 192, "channel_mult": [1, 2, 3, 4],
    }  # fmt: skip
    with torch.device("meta"):
        networks = SongUNet(**cifar), DhariwalUNet(**imagenet)
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts[0] == 55_733_891
    assert round(counts[1] / 1e6) == 296


def test_blocks_are_what_the_papers_say() -> None:
    """Attention against a plain softmax; resampling keeps the mean."""
    network, _ = make("adm")
    block = network.enc["4x4_block0"]
    assert block.heads == 2
    x = torch.randn(2, 128, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        packed = block.qkv(block.norm2(x)).reshape(2 * 2, 64, 3, 16)
        q, k, v = packed.unbind(2)
        weight = torch.einsum("bcq,bck->bqk", q, k / 8).softmax(-1)
        plain = torch.einsum("bqk,bck->bcq", weight, v).reshape(x.shape)
        torch.testing.assert_close(block._attend(x), block.proj(plain), rtol=1e-4, atol=1e-5)
        ones = torch.ones(1, 8, 8, 8)
        down = make("ncsn++")[0].enc["4x4_down"].skip
        plane = down.resample_filter
        smooth = down._filter(ones, plane, 1)
    torch.testing.assert_close(plane.sum(), torch.tensor(1.0))
    torch.testing.assert_close(smooth[..., 1:-1, 1:-1], torch.ones(1, 8, 2, 2))


def test_conditioning_and_time_reach_the_output() -> None:
    network, _ = make("ddpm++")
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        base = network(x, torch.tensor([0.1]), torch.tensor([1]))
        hot = network(x, torch.tensor([0.1]), torch.eye(4)[1:2])
        other_label = network(x, torch.tensor([0.1]), torch.tensor([2]))
        other_time = network(x, torch.tensor([0.5]), torch.tensor([1]))
    assert torch.equal(base, hot)
    assert min(float((base - o).abs().max()) for o in (other_label, other_time)) > 1e-4
    with pytest.raises(ValueError, match="class_labels"):
        network(x, torch.tensor([0.1]), torch.eye(3)[:1])


@pytest.mark.parametrize("case", CASES)
def test_half_precision_keeps_times_and_frequencies(case: str, monkeypatch: Any) -> None:
    """NCSN++ in bfloat16 had other frequencies: a quarter of its embedding was rounding."""
    times = torch.linspace(-1.5, 1.1, 40)

    def off() -> float:
        network, _ = make(case)
        half = make(case)[0].bfloat16()
        with torch.no_grad():
            angles, rounded = network.map_noise(times), encoded_times(half.map_noise, times, WEIGHT)
        return float((rounded.float() - angles).norm() / angles.norm())

    assert off() < 0.003
    if case == "ncsn++":
        state = make(case)[0].bfloat16().state_dict()
        assert list(state) == list(make(case)[0].state_dict())
        with monkeypatch.context() as planted:
            planted.delattr(Fourier, "_apply")
            assert off() > 0.1


def test_loading_does_not_ask_torchs_default_dtype(tmp_path: Any, monkeypatch: Any) -> None:
    """Weights were rounded to bfloat16 where the caller had made that torch's default."""
    network, settings = make("ddpm++")
    path = tmp_path / "network.pkl"
    path.write_bytes(snapshot_bytes(network, settings))

    def loaded() -> bool:
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = load_edm(path).network.state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
        return all(torch.equal(found[k], v) for k, v in network.state_dict().items())

    assert loaded()
    monkeypatch.setattr(SongUNet, "float", lambda self: self)  # planted: made in the default dtype
    assert not loaded()


# -- refusing ------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


MARK = "dlms-must-not-exist"
EVIL = {
    "os.system": lambda: Call(os.system, f"touch {MARK}"),
    "eval": lambda: Call(eval, f"open({MARK!r}, 'w')"),
    "getattr": lambda: Call(getattr, "x", "upper"),
    "import": lambda: Call(__import__, "os"),
    "torch.load": lambda: Call(torch.load, "other.pt"),
    "nested in tensor bytes": lambda: Call(
        torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {MARK}"))
    ),
    "inside a network": lambda: Persistent(
        "EDMPrecond", {"_modules": {"model": Call(os.system, f"touch {MARK}")}}
    ),
    "setattr through a builtin": lambda: Call(setattr, "a", "b", 1),
}


@pytest.mark.parametrize("name", EVIL)
def test_pickles_that_would_run_code_are_refused(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"ema": EVIL[name]()}, protocol=protocol))
        with pytest.raises(UnsafeCheckpointError, match="convert it") as refused:
            read_snapshot(path)
        assert str(path) in str(refused.value)
    assert not (tmp_path / MARK).exists()


def test_the_payload_works_where_it_is_not_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the ordinary reader does run it."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(EVIL["os.system"]()))
    assert (tmp_path / MARK).exists()


def test_every_reachable_global_is_known(tmp_path: Any) -> None:
    """A snapshot needs these names and no others; a new torch that adds one must be looked at."""
    network, settings = make("ddpm++")
    raw = snapshot_bytes(network, settings)
    strings = [arg for op, arg, _ in pickletools.genops(raw) if isinstance(arg, str)]
    assert "torch_utils.persistence" in strings
    (tmp_path / "good.pkl").write_bytes(raw)
    read_pickle(tmp_path / "good.pkl")


def tensor_call(size: Any, stride: Any, offset: Any = 0) -> bytes:
    stream = io.BytesIO()
    torch.save(torch.zeros(4).storage(), stream, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, stream.getvalue())
    return pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_stay_inside_their_values(tmp_path: Any) -> None:
    path = tmp_path / "tensor.pkl"
    path.write_bytes(tensor_call((2, 2), (2, 1)))
    assert torch.equal(read_pickle(path), torch.zeros(2, 2))
    for size, stride, offset in (
        ((5,), (1,), 0),
        ((2, 2), (3, 1), 0),
        ((1,), (1,), 4),
        ((2,), (-1,), 3),
    ):
        path.write_bytes(tensor_call(size, stride, offset))
        with pytest.raises(UnsafeCheckpointError):
            read_pickle(path)


def test_damaged_and_foreign_files_are_named(tmp_path: Any) -> None:
    path = tmp_path / "broken.pkl"
    network, settings = make("ddpm++")
    raw = snapshot_bytes(network, settings)
    for content in (b"", b"not a pickle", raw[: len(raw) // 2]):
        path.write_bytes(content)
        with pytest.raises(UnsafeCheckpointError, match="readable pickle"):
            read_snapshot(path)
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(ValueError, match="ema"):
        read_snapshot(path)
    path.write_bytes(snapshot_bytes(network, {**settings, "num_blocks": 2}))
    with pytest.raises(ValueError, match="do not fit"):
        load_edm(path)
    path.write_bytes(snapshot_bytes(network, {**settings, "made_up": 2}))
    with pytest.raises(ValueError, match="made_up"):
        load_edm(path)
    with pytest.raises(FileNotFoundError):
        read_snapshot(tmp_path / "missing.pkl")

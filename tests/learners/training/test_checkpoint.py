"""A distillation is resumed only from its own intact checkpoint, and a disk cannot end it."""

import logging
import math
import multiprocessing
import os
import stat

import pytest
import torch
from marks import slow
from safetensors import SafetensorError
from torch import nn

import dlms_engine as dlms
from dlms_engine.learners.training import checkpoint
from dlms_engine.learners.training.identity import SAMPLED, WHOLE, run_identity
from dlms_engine.learners.training.trainer import Progress
from dlms_engine.policies.distilled import DistilledSolver
from dlms_engine.support import files

SETTINGS = {
    "nfe": 3,
    "shape": (2, 4, 4),
    "trajectories": 48,
    "batch": 8,
    "validation_samples": 4,
    "validation_steps": 8,
    "checkpoint_seconds": 0.0,
    "progress": False,
    "method": "free_table",
}


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.mid_block = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, c=None):
        y = 0.2 * torch.tanh(self.mid_block(x)) + 0.5 * x
        return y if c is None else y + 0.3 * c.reshape(-1, 1, 1, 1)


def plain(seed=0, process=None):
    return dlms.Denoiser(Network(seed), process or dlms.processes.EDM(), "edm"), {}


def guided(scale=2.0, label=1.0):
    denoiser = dlms.Denoiser(
        Network(), dlms.processes.EDM(), "edm", guidance_scale=scale,
        unconditional={"c": torch.zeros(1)},
    )  # fmt: skip
    return denoiser, {"cond": {"c": torch.full((1,), label)}}


def interrupted(model, output, calls=120, **settings):
    """Leaves a checkpoint: KeyboardInterrupt in the network's ``calls``-th call."""
    denoiser, options = model
    count = 0

    def stop(*_):
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt

    hook = denoiser.network.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        dlms.distill(denoiser, output=output, **options, **{**SETTINGS, **settings})
    hook.remove()
    return output.with_name(output.name.removesuffix(".safetensors") + ".checkpoint.safetensors")


OTHERS = {
    "weights": (plain(0), plain(9), "network"),
    "noise range": (plain(0), plain(0, dlms.processes.EDM(0.01, 50.0)), "process"),
    "guidance": (guided(2.0), guided(7.0), "guidance_scale"),
    "condition": (guided(), guided(label=0.5), "conditions"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_of_another_model_is_not_resumed(what, tmp_path):
    """It was, without a word: the result belonged to neither model."""
    first, second, name = OTHERS[what]
    output = tmp_path / "run.safetensors"
    assert interrupted(first, output).exists()
    denoiser, options = second
    with pytest.raises(ValueError, match=f"belongs to another run .*{name}"):
        dlms.distill(denoiser, output=output, resume=True, **options, **SETTINGS)
    denoiser, options = first  # and its own still is
    dlms.distill(denoiser, output=output, resume=True, **options, **SETTINGS)


@pytest.mark.parametrize("method", ["gits", "dode"])
def test_a_restart_says_so(method, tmp_path, caplog):
    """They keep no checkpoint: what was asked to go on began anew without a word."""
    denoiser, _ = plain()
    settings = {"solver": "ddim", "trajectories": 4, "progress": False, "output": tmp_path / "s"}
    dlms.distill(denoiser, method, nfe=3, shape=(2, 8, 8), **settings)
    assert "starts from the beginning" not in caplog.text, "nothing was asked to go on"
    dlms.distill(denoiser, method, nfe=3, shape=(2, 8, 8), resume=True, **settings)
    assert f"s.checkpoint.safetensors is not there: {method} starts from the" in caplog.text


def test_how_often_a_checkpoint_is_written_may_change(tmp_path):
    output = tmp_path / "run.safetensors"
    interrupted(plain(), output)
    denoiser, _ = plain()
    settings = {**SETTINGS, "checkpoint_seconds": 1e9}
    whole = dlms.distill(plain()[0], **SETTINGS)
    resumed = dlms.distill(denoiser, output=output, resume=True, **settings)
    assert torch.equal(resumed.policy.b, whole.policy.b)


def test_every_flipped_byte_is_noticed(tmp_path):
    """One in the weights used to give another solver and exit status 0."""
    path = tmp_path / "c.safetensors"
    tensors = {"raw/a": torch.arange(5.0), "ema/b": torch.ones(2, 2, dtype=torch.float64)}
    checkpoint.save_checkpoint(path, tensors, Progress(), {"seed": 0})
    good = path.read_bytes()
    assert checkpoint.read_checkpoint(path, {"seed": 0})[0].keys() == tensors.keys()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match="damaged|not a checkpoint|format|another run"):
            checkpoint.read_checkpoint(path, {"seed": 0})
    path.write_bytes(good)
    checkpoint.read_checkpoint(path, {"seed": 0})


def test_outputs_that_differ_in_a_suffix_have_checkpoints_of_their_own(tmp_path):
    names = {interrupted(plain(), tmp_path / f"run.nfe{n}", nfe=n).name for n in (3, 4)}
    assert names == {"run.nfe3.checkpoint.safetensors", "run.nfe4.checkpoint.safetensors"}


def test_the_digest_sees_every_tensor_and_large_ones_in_places():
    denoiser, _ = plain()
    base = run_identity(denoiser, {})
    with torch.no_grad():
        denoiser.network.mid_block.bias[1] += 1e-6
    assert run_identity(denoiser, {}) != base
    large = nn.Linear(2 * WHOLE // 64, 64)
    model = dlms.Denoiser(large, dlms.processes.EDM(), "edm")
    base = run_identity(model, {})
    step = -(-large.weight.numel() // SAMPLED)
    with torch.no_grad():
        large.weight.view(-1)[7 * step] += 1
    assert run_identity(model, {}) != base


@pytest.mark.parametrize(
    "other", [{"time_input": "t"}, {"time_input": "sigma"}, {"dynamic_thresholding": 0.99}]
)
def test_a_network_called_otherwise_is_another_run(other):
    network, process = nn.Linear(2, 2), dlms.processes.EDM()
    base, same, changed = (
        run_identity(dlms.Denoiser(network, process, **given), {}) for given in ({}, {}, other)
    )
    assert base == same != changed


def hold(path, ready, done):
    with files.only_one(path):
        ready.set()
        done.wait(30)


def test_two_processes_do_not_share_an_output(tmp_path):
    output = tmp_path / "run.safetensors"
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(output, ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(RuntimeError, match=r"another process is making .*run\.safetensors"):
        dlms.distill(plain()[0], output=output, **SETTINGS)
    os.kill(other.pid, 9)  # the system lets go of it
    other.join()
    dlms.distill(plain()[0], output=output, **SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.safetensors"]


def full_disk(*_, **__):
    raise SafetensorError(
        'Io(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
    )


def test_a_full_disk_is_an_os_error_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """safetensors has an error class of its own: the message made for this never appeared."""
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, {"a": torch.zeros(2)}, Progress(), {})
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(
        OSError, match=r"could not write .*c\.safetensors .*No space left.*untouched"
    ):
        checkpoint.save_checkpoint(path, {"a": torch.ones(2)}, Progress(), {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(
    tmp_path, monkeypatch, caplog
):
    whole = dlms.distill(plain()[0], **SETTINGS)
    monkeypatch.setattr(files, "save_file", full_disk)
    with caplog.at_level(logging.WARNING, "dlms_engine"):
        solver = dlms.distill(plain()[0], output=tmp_path / "run.safetensors", **SETTINGS)
    assert torch.equal(solver.policy.b, whole.policy.b)
    assert "no checkpoint: " in caplog.text and "No space left" in caplog.text


def test_a_disk_that_fills_up_leaves_the_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    whole = dlms.distill(plain()[0], **SETTINGS)
    output = tmp_path / "run.safetensors"

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DistilledSolver, "save", no_room)
        with pytest.raises(OSError, match=r"run\.checkpoint\.safetensors is kept, resume goes on"):
            dlms.distill(plain()[0], output=output, **SETTINGS)
    again = dlms.distill(plain()[0], output=output, resume=True, **SETTINGS)
    assert torch.equal(again.policy.b, whole.policy.b)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_disk_without_room_is_refused_before_the_network_is_called(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    denoiser, calls = plain()[0], []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(files, "_sync", no_room)
    with pytest.raises(OSError, match=r"could not write .*run\.safetensors .*No space left"):
        dlms.distill(denoiser, output=tmp_path / "run.safetensors", **SETTINGS)
    assert not calls


class Broken(Network):
    """Not finite in one pixel from one of its calls on."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def forward(self, x, t):
        self.left -= 1
        out = super().forward(x, t)
        return (
            out
            if self.left >= 0
            else out.index_fill(-1, torch.zeros(1, dtype=torch.int64), math.nan)
        )


SHORT = {
    "free_table": SETTINGS,
    "dlms": SETTINGS,
    "amed": SETTINGS,
    "ld3": {"batch": 8, "validation": 4, "train": 8},
    "gits": {"trajectories": 16, "points": 12},
    "dode": {"trajectories": 32, "scale": 3},
    "auto": {"budget": "8k", "effort": "lean", "samples": 64},
}


@pytest.mark.parametrize(
    ("method", "after"),
    [(method, 0) for method in SHORT]
    + [("free_table", 20), ("dlms", 20), ("amed", 20), ("ld3", 250), ("gits", 20)]
    + [slow("auto", 600)],
)  # fmt: skip
def test_a_network_that_gives_nan_ends_with_the_cause(method, after, tmp_path):
    """Some trained to the end and failed then, on JSON that cannot hold NaN or in a format; some
    gave the solver that they had started from."""
    denoiser = dlms.Denoiser(Broken(after), dlms.processes.EDM(), "edm", features="mid_block")
    settings = (
        {"nfe": 3, "shape": (2, 8, 8), "progress": False} | SHORT[method] | {"method": method}
    )
    output = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError, match=r"the network's outputs are not finite") as error:
        dlms.distill(denoiser, output=output, **settings)
    checkpoint_path = tmp_path / "run.checkpoint.safetensors"
    assert not output.exists()
    assert checkpoint_path.exists() == ("holds the last good state" in str(error.value))
    assert checkpoint_path.exists() == (after > 0 and method != "gits")  # which has none


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    """Solver files were 0600 whatever the umask: nobody else on the machine could read them."""
    before = os.umask(0o027)
    try:
        path = tmp_path / "s.safetensors"
        process = dlms.processes.EDM()
        table = dlms.solvers.ddim(process, dlms.grids.polynomial(process, 4))
        dlms.save(path, table)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)

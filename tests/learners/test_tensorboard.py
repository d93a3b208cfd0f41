"""``tensorboard=`` logs every update and validation; a resumed run goes on in the same curves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mixture_network import mixture_denoiser

from dlms_engine.cli import main
from dlms_engine.learners import distill
from dlms_engine.learners.dlms.objective import Dlms
from dlms_engine.learners.training.monitor import TensorBoard, scalars

QUICK = {
    "dlms": {"trajectories": 48, "batch": 8, "validation_samples": 4, "validation_steps": 8,
             "validate_every": 2},
    "free_table": {"trajectories": 48, "batch": 8, "validation_samples": 4, "validation_steps": 8,
                   "validate_every": 2, "teacher_steps": 8},
    "amed": {"trajectories": 48, "batch": 8, "validation_samples": 4, "validation_steps": 8,
             "validate_every": 2},
    "ld3": {"trajectories": 4, "validation": 2, "rounds": 1, "rounds_times": 1, "loss": "l2",
            "teacher_nfe": 8},
    "dode": {"trajectories": 8},
    "gits": {"trajectories": 8, "points": 13},
}  # fmt: skip


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the tensorboard package",
    )
    read = module.EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def run(method: str, folder: Path, **changes):
    return distill(
        mixture_denoiser(), method, nfe=4, shape=(16,), progress=False, tensorboard=folder,
        **{**QUICK[method], **changes},
    )  # fmt: skip


@pytest.mark.parametrize("method", QUICK)
def test_every_number_of_the_history_is_a_point(method: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    solver = run(method, tmp_path)
    found = curves(tmp_path)
    counted = 0
    for index, entry in enumerate(solver.history):
        step = entry.get("update", index)
        for tag, value in scalars(entry).items():
            if method == "gits" and tag.startswith("indices"):
                continue
            points = [v for s, v in found[tag] if s == step]
            assert any(v == pytest.approx(value, rel=1e-6) for v in points), (tag, step)
            counted += 1
    assert counted >= (2 if method == "gits" else 10)
    if method not in ("dode", "gits"):
        assert len(found["lr"]) == len(solver.history)
        assert ("r/01" if method == "amed" else "grid/01") in found


def test_a_resumed_run_goes_on_in_the_same_curve(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    original, calls = Dlms.iteration, 0

    def killed(self, noise):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        yield from original(self, noise)

    monkeypatch.setattr(Dlms, "iteration", killed)
    output = tmp_path / "s.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run("dlms", tmp_path / "events", output=output)
    assert [s for s, _ in curves(tmp_path / "events")["loss"]] == [1, 2, 3]
    monkeypatch.setattr(Dlms, "iteration", original)
    resumed = run("dlms", tmp_path / "events", output=output, resume=True)
    found = curves(tmp_path / "events")["loss"]
    assert [s for s, _ in found] == [1, 2, 3, 4, 5, 6]
    losses = [e["loss"] for e in resumed.history if "loss" in e]
    assert [v for _, v in found] == pytest.approx(losses, rel=1e-6)


def test_the_command_line_has_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    settings = [f"--set={k}={v}" for k, v in QUICK["dlms"].items() if k != "trajectories"]
    main(["distill", "--model", "cli_model:tiny", "--method", "dlms", "--nfe", "3",
          "--trajectories", "16", "--json",
          "-o", str(tmp_path / "s.safetensors"), "--tensorboard", str(tmp_path / "events"),
          *settings])  # fmt: skip
    assert len(curves(tmp_path / "events")["loss"]) == 2


def test_a_missing_package_is_said_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'dlms_engine\[tensorboard\]'"):
        run("dlms", tmp_path)
    with pytest.raises(ImportError, match="tensorboard"):
        TensorBoard(tmp_path)


def test_lists_become_curves_and_text_is_left_out() -> None:
    numbers = {"update": 3, "loss": 1, "describe": {"grid": [80.0, 1.0]}, "set": "raw", "x": None}
    assert scalars(numbers) == {"loss": 1.0, "grid/00": 80.0, "grid/01": 1.0}

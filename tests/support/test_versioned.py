"""Pickles and files of other versions are refused with a message that says what to do."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from dlms_engine import grids, processes, solvers
from dlms_engine.engine.sampler import Sampler
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.distilled import DistilledSolver, load_solver, save_solver
from dlms_engine.solvers.format import SolverFileError
from dlms_engine.support import versioned


def objects() -> dict[str, Any]:
    process = processes.EDM()
    table = solvers.ddim(process, grids.polynomial(process, 3))
    denoiser = Denoiser(torch.nn.Conv2d(3, 3, 1), process, "data")
    return {
        "SolverTable": table,
        "DistilledSolver": DistilledSolver(table, "ld3"),
        "Denoiser": denoiser,
        "Sampler": Sampler(denoiser, table),
    }


@pytest.mark.parametrize("name", objects())
@pytest.mark.parametrize("writer", ["0.0.9", None])
def test_pickles_of_other_versions_are_refused(
    name: str, writer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same version reads them; another one, and one that did not say, does not."""
    held = objects()[name]
    if name not in ("Sampler", "Denoiser"):
        assert type(pickle.loads(pickle.dumps(held))) is type(held)
    assert type(copy.deepcopy(held)) is type(held)
    state = held.__getstate__()
    assert state.pop(versioned.KEY) == versioned.__version__
    if writer is not None:
        state[versioned.KEY] = writer
    other = type(held).__new__(type(held))
    with pytest.raises(versioned.VersionError, match=f"this {name} was pickled by .*load_solver"):
        other.__setstate__(state)


def test_a_whole_pickle_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pickle.dumps(objects()["SolverTable"])
    monkeypatch.setattr(versioned, "__version__", "9.9.9")
    with pytest.raises(versioned.VersionError, match=r"dlms_engine 0\..*this is 9\.9\.9"):
        pickle.loads(raw)
    # planted: without the check the old attributes would be taken as they are
    monkeypatch.setattr(versioned, "check_version", lambda *_: None)
    assert pickle.loads(raw).nfe == 3


def test_modules_of_torch_save(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlms_engine.checkpoints.networks import SongUNet

    network = SongUNet(
        img_resolution=8, in_channels=3, out_channels=3, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[],
    )  # fmt: skip
    file = io.BytesIO()
    torch.save(network, file)
    monkeypatch.setattr(versioned, "__version__", "9.9.9")
    file.seek(0)
    with pytest.raises(versioned.VersionError, match="dlms convert"):
        torch.load(file, weights_only=False)


@pytest.mark.parametrize(("version", "advice"), [(2, "newer dlms_engine"), (0, "distil .* again")])
def test_solver_files_of_other_versions(tmp_path: Path, version: int, advice: str) -> None:
    """Named by version even where another version has other keys."""
    path = save_solver(tmp_path / "solver.safetensors", objects()["SolverTable"])
    raw = path.read_bytes()
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + size])
    description = json.loads(header["__metadata__"]["description"])
    description |= {"version": version, "a key of that version": 1}
    header["__metadata__"]["description"] = json.dumps(description)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])
    with pytest.raises(
        SolverFileError, match=rf"version are \('dlms-solver', {version}\).*{advice}"
    ):
        load_solver(path)

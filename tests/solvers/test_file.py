"""Solver files: exact round trips, and every kind of damage refused with its reason."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlms_engine import Denoiser, distill, grids
from dlms_engine.policies.distilled import load_solver, save, save_solver
from dlms_engine.processes import (
    EDM,
    PROCESSES,
    VP,
    Cosine,
    RectifiedFlow,
    VPDiscrete,
    require_known,
)
from dlms_engine.solvers import file as solver_file
from dlms_engine.solvers import format as solver_format
from dlms_engine.solvers import heun, ipndm, make_solver, unipc
from dlms_engine.solvers.file import SolverFileError, SolverRecord, read_solver, register_kind
from dlms_engine.solvers.format import MAX_BYTES, serialize
from dlms_engine.solvers.table import SolverTable

TABLE = ipndm(EDM(), grids.polynomial(EDM(), 2), order=2)


def record(**changes: Any) -> SolverRecord:
    base = SolverRecord("table", TABLE.process, TABLE.to_dict(), TABLE.settings())
    return dataclasses.replace(base, **changes)


def written(path: Path, **changes: Any) -> Path:
    """A file with a correct checksum, whatever it says."""
    path.write_bytes(serialize(record(**changes)))
    return path


def assert_same(one: SolverTable, other: SolverTable) -> None:
    for name, value in one.to_dict().items():
        assert torch.equal(value, getattr(other, name)), name
    assert one.settings() == other.settings() and one.process == other.process


@pytest.mark.parametrize("process", [EDM(), VP(), RectifiedFlow()], ids=lambda p: p.name)
@pytest.mark.parametrize("make", [ipndm, unipc, heun])
def test_round_trip_is_exact(tmp_path: Path, process: Any, make: Any) -> None:
    table = make(process, grids.time_uniform(process, 5), afs=True)
    path = save_solver(tmp_path / "solver.safetensors", table, training={"seed": 3})
    assert_same(load_solver(path), table)
    held = read_solver(path)
    assert held.kind == "table" and held.training == {"seed": 3} and held.distilled is None


def test_a_thousand_level_model_and_a_batch_fit(tmp_path: Path) -> None:
    process = VPDiscrete(betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    grid = grids.discrete(process, 4)
    table = ipndm(process, torch.stack([grid] * 3))
    assert_same(load_solver(save(tmp_path / "x", table)), table)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["ddim", "ipndm", "deis", "dpm_solver_pp", "unipc"]),
    st.lists(st.floats(0.003, 79), min_size=0, max_size=6, unique=True),
    st.booleans(),
)
def test_round_trip_of_any_times(name: str, inner: list[float], last_zero: bool) -> None:
    times = [80.0, *sorted(inner, reverse=True), 0.0 if last_zero else 0.002]
    table = make_solver(name, EDM(), grids.from_times(EDM(), times))
    raw = serialize(solver_file.record_of(table))
    held = solver_format.parse(Path("memory"), raw)
    assert_same(SolverTable.from_dict(held.process, held.tensors, held.settings), table)


def test_same_bytes_every_time(tmp_path: Path) -> None:
    assert save(tmp_path / "a", TABLE).read_bytes() == save(tmp_path / "b", TABLE).read_bytes()


def test_distilled_solver_comes_back_as_one(tmp_path: Path) -> None:
    from dlms_engine.policies.distilled import DistilledSolver

    solver = DistilledSolver(TABLE, "ld3", {"lr": 1e-3}, [{"loss": 1.0}], {"score": 0.5})
    again = load_solver(save(tmp_path / "x", solver))
    assert isinstance(again, DistilledSolver)
    assert (again.method, again.settings, again.best) == ("ld3", {"lr": 1e-3}, {"score": 0.5})
    assert_same(again.policy, TABLE)


def test_designer_comes_back_bit_for_bit(tmp_path: Path) -> None:
    from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

    weights = torch.zeros(4, 2, dtype=torch.float64)
    weights[:, 0] = 1
    designer = Designer(DesignerSettings(4, 2), EDM(), grids.polynomial(EDM(), 4), weights)
    again = load_solver(save(tmp_path / "x", DesignerPolicy(designer)))
    for key, value in designer.state_dict().items():
        assert torch.equal(again.designer.state_dict()[key], value), key


def test_other_kinds_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_file, "_loaders", dict(solver_file._loaders))
    register_kind("pair", lambda process, tensors, settings: (process.name, tensors["w"].tolist()))
    path = written(tmp_path / "x", kind="pair", tensors={"w": torch.ones(2).double()}, settings={})
    assert load_solver(path) == ("edm", [1.0, 1.0])


# -- damage ----------------------------------------------------------------------------------


def accepted_flips(raw: bytes, flips: tuple[int, ...]) -> list[int]:
    """Offsets at which some one-byte change is not refused; any other exception propagates."""
    found = []
    for offset in range(len(raw)):
        for flip in flips:
            damaged = bytearray(raw)
            damaged[offset] ^= flip
            try:
                solver_format.parse(Path("memory"), bytes(damaged))
            except SolverFileError:
                continue
            found.append(offset)
    return found


def test_every_flipped_byte_is_refused() -> None:
    assert accepted_flips(serialize(record()), (0x01, 0x29, 0xFF)) == []


def test_the_flip_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checksum, changed but plausible numbers pass."""
    monkeypatch.setattr(solver_format, "_digest", lambda description, tensors: "0" * 64)
    assert len(accepted_flips(serialize(record()), (0x01,))) > 50


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw, path = serialize(record()), tmp_path / "x"
    for size in range(len(raw)):
        with pytest.raises(SolverFileError):
            solver_format.parse(path, raw[:size])
    with pytest.raises(SolverFileError):
        solver_format.parse(path, raw + b"\0")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_refused(tail: bytes, framed: bool) -> None:
    raw = struct.pack("<Q", len(tail)) + tail if framed else tail
    with pytest.raises(SolverFileError):
        solver_format.parse(Path("memory"), raw)


def nan_table() -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in TABLE.to_dict().items()}
    tensors["b"][1, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pickle"}, "kind is 'pickle', expected one of"),
        ({"kind": ["table"]}, "kind is"),
        ({"settings": {**TABLE.settings(), "name": "magic"}}, "method is 'magic'"),
        ({"settings": {**TABLE.settings(), "extra": 1}}, "settings are"),
        ({"settings": {**TABLE.settings(), "nfe": 3}}, "3, but the table has 2"),
        ({"settings": {**TABLE.settings(), "nfe": 10**12}}, "the integer 1000000000000"),
        ({"settings": {**TABLE.settings(), "prediction": "x"}}, "prediction is 'x'"),
        ({"tensors": nan_table()}, "tensor 'b' holds NaN"),
        ({"tensors": {**TABLE.to_dict(), "b": TABLE.b[:1]}}, "has shape|expected"),
        ({"tensors": {**TABLE.to_dict(), "c": TABLE.b}}, "tensors are"),
        ({"tensors": {"a": TABLE.a}}, "tensors are"),
        ({"tensors": {**TABLE.to_dict(), "times": -TABLE.times}}, "times are"),
        ({"distilled": {"method": "ld3"}}, "distilled has"),
        ({"distilled": {"method": "?", "settings": {}, "best": {}}}, "method is"),
        ({"distilled": {"method": "ld3", "settings": [], "best": {}}}, "distilled settings"),
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    path = written(tmp_path / "odd.safetensors", **changes)
    with pytest.raises(SolverFileError, match=message) as caught:
        load_solver(path)
    assert str(path) in str(caught.value)


def reheadered(path: Path, edit: Any) -> Path:
    """A file whose description was edited and its checksum renewed."""
    raw = serialize(record())
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + size])
    description = json.loads(header["__metadata__"]["description"])
    edit(description)
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = solver_format._digest(text, TABLE.to_dict())
    header["__metadata__"] = {"description": text, "sha256": digest}
    head = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(version=2), "newer"),
        (lambda d: d.update(version=True), "version"),
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(surprise=1), "description has"),
        (lambda d: d.pop("kind"), "description has"),
        (lambda d: d.update(process={"name": "ve"}), "process name is 've'"),
        (lambda d: d.update(process={"name": "edm", "rho": 7}), "rho"),
        (lambda d: d.update(process={"name": "edm", "t_min": -1.0, "t_max": 1.0}), "t_min is -1"),
        (lambda d: d.update(process=[]), "process is"),
        (lambda d: d.update(settings=None), "settings is None"),
        (lambda d: d["settings"].update(options={"x": float("nan")}), "not a JSON number"),
    ],
)
def test_wrong_descriptions_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    assert_same(load_solver(reheadered(tmp_path / "same", lambda d: None)), TABLE)
    with pytest.raises(SolverFileError, match=message):
        load_solver(reheadered(tmp_path / "x", edit))


def test_a_renamed_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "solver.safetensors"
    torch.save({"a": TABLE.a}, path)
    with pytest.raises(SolverFileError, match="not a safetensors"):
        load_solver(path)


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SolverFileError, match="limit"):
        load_solver(path)
    big = record(tensors={**TABLE.to_dict(), "x": torch.zeros(MAX_BYTES // 8).double()})
    with pytest.raises(SolverFileError, match="limit"):
        save(tmp_path / "y", big)
    assert not (tmp_path / "y").exists()


def test_safetensors_of_other_programs_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "x")
    with pytest.raises(SolverFileError, match="not a safetensors solver file"):
        load_solver(tmp_path / "x")
    save_file({"a": torch.ones(3)}, tmp_path / "y", metadata={"format": "pt"})
    with pytest.raises(SolverFileError, match="metadata is"):
        load_solver(tmp_path / "y")


# -- writing ---------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x", TABLE)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)  # os.replace is bound early in Python 3.10
    with pytest.raises(OSError, match="disk full"):
        save(path, unipc(EDM(), grids.polynomial(EDM(), 3)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("solver", "training", "message"),
    [
        (dataclasses.replace(TABLE, name="magic"), None, "method is 'magic'"),
        (TABLE, {"x": object()}, "not JSON serializable"),
        (TABLE, {"x": float("inf")}, "Out of range"),
        (object(), None, "object cannot be saved"),
        (record(kind="other"), None, "kind is 'other'"),
        (record(tensors=nan_table()), None, "NaN"),
        (record(tensors={"i": torch.ones(2, dtype=torch.int64)}), None, "floating point"),
    ],
)
def test_unsaveable_solvers_write_nothing(
    tmp_path: Path, solver: Any, training: Any, message: str
) -> None:
    with pytest.raises(SolverFileError, match=message):
        save(tmp_path / "x", solver, training=training)
    assert os.listdir(tmp_path) == []


class Trigonometric(Cosine):
    """A process of the user's own."""

    name = "trigonometric"


def test_a_process_that_no_file_can_name_is_refused_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`distill` and `save` wrote a file that nothing could read again."""
    process, path = Trigonometric(), tmp_path / "s.safetensors"
    table = ipndm(process, grids.time_uniform(process, 3))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the network was called")

    with pytest.raises(ValueError, match=r"'trigonometric' \(Trigonometric\) is not in"):
        distill(Denoiser(never, process, "data"), nfe=3, shape=(2,), output=path)
    with pytest.raises(SolverFileError, match="process name is 'trigonometric'"):
        save_solver(path, table)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(PROCESSES, "trigonometric", Trigonometric)
    assert_same(load_solver(save_solver(path, table)), table)
    monkeypatch.setitem(PROCESSES, "trigonometric", Cosine)  # planted: one of another class
    with pytest.raises(ValueError, match="is not in"):
        require_known(process)


def test_integer_keys_are_normalised(tmp_path: Path) -> None:
    path = save(tmp_path / "x", TABLE, training={10: "a", 9: "b"})
    assert read_solver(path).training == {"10": "a", "9": "b"}

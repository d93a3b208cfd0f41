"""Pickles are read as data: whatever the bytes say, nothing is called, nothing grows without limit,
and what is wrong has one type of error."""

import io
import os
import pickle
import random
import struct
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_edm import Call, make, snapshot_bytes, writers  # noqa: F401

from dlms_engine.checkpoints import plain_pickle
from dlms_engine.checkpoints.restricted import UnsafeCheckpointError, read_pickle


def read(data: bytes, tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    return read_pickle(path)


PLAIN = [
    {"a": [1, 2.5, "x", b"y", None, True, (1, 2), {3, 4}], "b": {"c": 10**30}},
    OrderedDict(a=1, b=[OrderedDict(c=())]),
    [float("inf"), -1, 255, 65536, 2**40, "é" * 300, b"z" * 300],
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_is_read_as_pickle_reads_it(value, protocol, tmp_path):
    assert read(pickle.dumps(value, protocol), tmp_path) == value


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_scalars_dtypes_and_arrays_are_numbers_and_tensors(protocol, tmp_path):
    """Snapshots written by training scripts hold settings that NumPy computed."""
    value = {
        "resolution": np.int64(32),
        "sigma": np.float64(0.5),
        "half": np.float16(0.25),
        "flag": np.bool_(True),
        "big endian": np.array([1.5, -2.0], ">f4"),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    got = read(pickle.dumps(value, protocol), tmp_path)
    for name, expected in value.items():
        if isinstance(expected, np.ndarray):
            assert torch.equal(
                got[name], torch.from_numpy(expected.astype(np.float64).copy()).to(got[name].dtype)
            )
        else:
            assert type(got[name]) in (int, float, bool) and got[name] == expected
    with pytest.raises(UnsafeCheckpointError, match="dtype 'O8'"):
        read(pickle.dumps(np.array([object], dtype=object).dtype, protocol), tmp_path)


def deep(levels: int, tuples: bool = False) -> bytes:
    """Nested without recursion: Python's pickler could not write it."""
    return (
        b"\x80\x04"
        + (b"N" + b"\x85" * levels if tuples else b"]" * levels + b"a" * (levels - 1))
        + b"."
    )


def doubling(levels: int) -> bytes:
    """A list that holds a list twice that holds a list twice ...: 2**levels nodes in a few bytes."""
    body = b"\x80\x04]\x94"
    for index in range(levels):
        body += b"](h" + bytes([index]) + b"h" + bytes([index]) + b"e\x94"
    return body + b"."


STORAGE = b"ctorch.storage\n_load_from_bytes\n"
CRAFTED = {
    "nested lists": (deep(100_000), "nested deeper"),
    "nested tuples": (deep(100_000, tuples=True), "nested deeper"),
    "nested key": (b"\x80\x04}" + b"N" + b"\x85" * 100_000 + b"Ns.", "tuple as a key"),
    "nested set member": (b"\x80\x04\x8f(" + b"N" + b"\x85" * 100_000 + b"\x90.", "tuple as a key"),
    "doubled lists": (doubling(100), "more than 1000000 nodes"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "contains itself"),
    "long claims": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "not a readable pickle"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "not a readable pickle"),
    "huge key": (b"\x80\x04}\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b"Ns.", "128 bits"),
    "extension": (b"\x80\x04\x82\x01.", "operation EXT1"),
    "persistent": (b"\x80\x04Pabc\n.", "operation PERSID"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "operation INST"),
    "call of a value": (b"\x80\x04N)R.", "not a name"),
    "call of a list": (b"\x80\x04cbuiltins\nset\n]R.", "not a name"),
    "state of a list": (b"\x80\x04]}b.", "state of a list"),
    "state of None": (b"\x80\x04N}b.", "state of a NoneType"),
    "state of a name": (b"\x80\x04cbuiltins\nset\n}b.", "state of a Global"),
    "append to a name": (b"\x80\x04cbuiltins\nset\nNa.", "does not have it"),
    "keywords": (b"\x80\x04cbuiltins\nset\n)}Na\x92.", "does not have it|keywords"),
    "nothing on the stack": (b"\x80\x04.", "more than the stack holds"),
    "mark missing": (b"\x80\x04t.", "mark that is not there"),
    "unknown memory": (b"\x80\x04h\x07.", "not remembered"),
    "odd dictionary": (b"\x80\x04(Nd.", "key and no value"),
    "no end": (b"\x80\x04N", "readable pickle"),
    "many operations": (b"\x80\x04" + b"N0" * 1_100_000 + b"N.", "more than 2000000 operations"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_are_refused_at_once_and_by_reason(name, tmp_path):
    data, reason = CRAFTED[name]
    start = time.process_time()
    with pytest.raises(UnsafeCheckpointError, match=reason):
        read(data, tmp_path)
    assert time.process_time() - start < (20 if name == "many operations" else 2)


def tensor_bytes(values=4):
    stream = io.BytesIO()
    torch.save(torch.zeros(values).storage(), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_the_state_of_a_tensor_cannot_be_set(tmp_path):
    """``BUILD`` on a tensor called ``Tensor.__setstate__``, which read memory nobody had written."""

    class Stateful:
        def __reduce__(self):
            storage = Call(torch.storage._load_from_bytes, tensor_bytes())
            tensor = (storage, 0, (2, 2), (2, 1), False, {})
            state = (storage, 0, (50_000,), (1,))
            return torch._utils._rebuild_tensor_v2, tensor, state

    with pytest.raises(UnsafeCheckpointError, match="state of a Tensor"):
        read(pickle.dumps(Stateful()), tmp_path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((10**12,), (0,), 0),  # any amount from one value
        ((2, 2), (1,), 0),
        ((2, 2), (2, 1), True),
        ((2.0, 2), (2, 1), 0),
        ((2**70,), (1,), 0),
        ([2, 2], (2, 1), 0),
        ((1,) * 17, (1,) * 17, 0),
        ((0, 2**62, 2**62), (1, 1, 1), 2**62),  # empty: allowed, but reads nothing
    ],
)
def test_a_tensor_has_no_more_elements_than_values(size, stride, offset, tmp_path):
    storage = Call(torch.storage._load_from_bytes, tensor_bytes())
    data = pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    )
    try:
        assert read(data, tmp_path).numel() == 0
    except UnsafeCheckpointError as error:
        assert "tensor of" in str(error) or "readable pickle" in str(error)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_random_files_are_read_or_refused(tmp_path):
    """1,000 files from fixed seeds: snapshots with bytes changed, moved, cut or doubled, and runs of
    random operations."""
    network, settings = make("ddpm++")
    good = snapshot_bytes(network, settings)
    small = pickle.dumps(PLAIN, protocol=2)
    before, rng, outcomes = set(os.listdir(tmp_path)), random.Random(0), {"read": 0, "refused": 0}
    operations = [bytes([b]) for b in range(256)]
    for index in range(1000):
        if index % 2:
            data = bytearray(good if index % 4 == 1 else small)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(min(len(data), 3000))
                act = rng.randrange(4)
                if act == 0:
                    data[at] = rng.randrange(256)
                elif act == 1:
                    del data[at : at + rng.randint(1, 20)]
                elif act == 2:
                    data[at:at] = data[at : at + rng.randint(1, 50)]
                else:
                    data[at:at] = rng.choice(operations)
        else:
            data = b"\x80\x04" + b"".join(rng.choices(operations, k=rng.randint(1, 60))) + b"."
        start = time.process_time()
        try:
            read(bytes(data), tmp_path)
            outcomes["read"] += 1
        except UnsafeCheckpointError:
            outcomes["refused"] += 1
        assert time.process_time() - start < 5, index
    assert min(outcomes.values()) > 5, outcomes
    assert set(os.listdir(tmp_path)) - before == {"file.pkl"}


def test_the_limits_count_shared_parts_as_often_as_they_appear(monkeypatch):
    monkeypatch.setattr(plain_pickle, "MAX_NODES", 50)
    assert plain_pickle.load_pickle(io.BytesIO(doubling(3)), {})
    with pytest.raises(plain_pickle.Refused, match="nodes"):
        plain_pickle.load_pickle(io.BytesIO(doubling(6)), {})

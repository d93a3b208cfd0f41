"""When two runs share a CUDA graph; no GPU is needed."""

from __future__ import annotations

import copy
import dataclasses
import decimal
import enum
import functools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.modules.module as every_module
from graph_cases import Adapted, Slotted, X
from torch import Tensor, nn

from dlms_engine.engine import cuda_graph_cache
from dlms_engine.engine.cuda_graph_cache import graph_key, split_tensors
from dlms_engine.engine.cuda_graph_fallback import python_key
from dlms_engine.engine.native import native

pytestmark = pytest.mark.usefixtures("graph_backend")


def test_equal_runs_share_a_key_whatever_the_values():
    net = nn.Linear(2, 2)
    keys = {graph_key(net, {"x": torch.randn(3), "y": torch.zeros(2)}, (4,))[0] for _ in range(3)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(4)},
        {"x": torch.zeros(3, dtype=torch.float64)},
        {"z": torch.zeros(3)},
        {"x": torch.zeros(3), "y": torch.zeros(1)},
    ],
    ids=["shape", "dtype", "name", "more"],
)
def test_inputs_change_the_key(other):
    assert graph_key(len, other)[0] != graph_key(len, X)[0]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 2),
        (1, 1.0),
        (1, True),
        ("a", "b"),
        ("a", b"a"),
        (("ab", "c"), ("a", "bc")),
        ((1, (2,)), ((1, 2),)),
        ({"a": 1}, {"a": 2}),
        (torch.float32, torch.float16),
        (torch.device("cpu"), torch.device("cuda:1")),
        (None, 0),
        (2**80, 2**80 + 1),
        (len, max),
    ],
)
def test_options_change_the_key(one, two):
    assert graph_key(len, X, (one,))[0] == graph_key(len, X, (one,))[0]
    assert graph_key(len, X, (one,))[0] != graph_key(len, X, (two,))[0]


def test_autocast_precision_and_network_change_the_key():
    base = graph_key(len, X, (1,))[0]
    assert graph_key(max, X, (1,))[0] != base
    torch.set_autocast_enabled("cuda", True)  # the context manager refuses without a GPU
    try:
        assert graph_key(len, X, (1,))[0] != base
    finally:
        torch.set_autocast_enabled("cuda", False)
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(not before)
    try:
        assert graph_key(len, X, (1,))[0] != base
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def _swap_weight(net: nn.Module) -> None:
    net[0].weight.data = net[0].weight.data.clone()  # what .to() does


CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight": _swap_weight,
    "training": lambda net: net.eval(),
    "lora scale": lambda net: net[0].scaling.update(default=0.5),
    "active adapter": lambda net: net[0]._active_adapter.append("other"),
    "disabled": lambda net: setattr(net[0], "_disable_adapters", True),
    "processor's scale": lambda net: setattr(net[0].processor, "scale", 2.0),
    "processor": lambda net: setattr(net[0], "processor", nn.Identity()),
    "freeu": lambda net: setattr(net[0], "b1", 1.2),
    "tensor attribute": lambda net: setattr(net[0], "table", torch.ones(2)),
    "rows of a tensor attribute": lambda net: setattr(net[0], "rows", net[0].memory[:3]),
    "strides of a tensor attribute": lambda net: setattr(net[0], "rows", net[0].memory[:2].t()),
    "rows of a buffer": lambda net: setattr(net[0], "part", net[0].memory[:3]),
    "number on the host": lambda net: net[0].strength.fill_(0.7),
    "hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "new attribute": lambda net: setattr(net[0], "extra", 1),
    "another class": lambda net: setattr(net[0], "__class__", type("Patched", (Adapted,), {})),
    "another layer": lambda net: net.append(nn.ReLU()),
    "buffer": lambda net: net[0].register_buffer("shift", torch.zeros(2)),
    "item of a set": lambda net: net[0].skipped.add(2),
    "item of a queue": lambda net: net[0].recent.append(3),
    "number of numpy's": lambda net: setattr(net[0], "factor", np.float32(2.0)),
    "array": lambda net: net[0].factors.__setitem__(1, 2.0),
    "complex": lambda net: setattr(net[0], "phase", 1 + 3j),
    "range": lambda net: setattr(net[0], "window", range(5)),
    "argument of a partial": lambda net: setattr(net[0], "call", functools.partial(pow, 3)),
    "slot": lambda net: setattr(net[0].slotted, "scale", 2.0),
    "hook of every module": lambda net: every_module.register_module_forward_hook(hook),
    "hook before every module": lambda net: every_module.register_module_forward_pre_hook(hook),
}


def hook(*_: Any) -> None: ...


@pytest.fixture
def no_hooks_of_every_module() -> Iterator[None]:
    yield
    every_module._global_forward_hooks.clear()
    every_module._global_forward_pre_hooks.clear()


@pytest.mark.usefixtures("no_hooks_of_every_module")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_network_changes_the_key(change):
    net = nn.Sequential(Adapted(), nn.Dropout())
    before = graph_key(net, X)[0]
    with torch.no_grad():
        net[0].weight.add_(1)  # in place: a graph sees it
    net(torch.zeros(2))
    assert graph_key(net, X)[0] == before
    CHANGES[change](net)
    assert graph_key(net, X)[0] != before


def test_what_stays_outside_of_keys_says_so_itself():
    class Position:
        _outside_graph_keys = True

        def __init__(self) -> None:
            self.first = 0

    net = nn.Sequential(Adapted())
    net[0].position = Position()
    before = graph_key(net, X)[0]
    net[0].position.first = 1
    assert graph_key(net, X)[0] == before
    net[0].position = Slotted(1.0)
    assert graph_key(net, X)[0] != before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_is_another_network(again):
    """A pickle's attribute names are other strings than those that code sets."""
    net = nn.Sequential(Adapted(), nn.Dropout())
    other = again(net)
    assert graph_key(other, X)[0] != graph_key(net, X)[0]
    before = graph_key(other, X)[0]
    assert graph_key(other, X)[0] == before
    other[0].weight.data = other[0].weight.data.clone()
    assert graph_key(other, X)[0] != before


def test_a_network_inside_a_function_is_seen(graph_backend):
    if graph_backend == "python":
        pytest.skip("the compiled key only")
    net = nn.Linear(2, 2)

    def call(x: Tensor) -> Tensor:
        return net(x)

    before = graph_key(call, X)[0]
    assert graph_key(call, X)[0] == before
    net.weight.data = net.weight.data.clone()
    assert graph_key(call, X)[0] != before


def test_keys_of_a_network_that_refers_to_itself():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].parent = [net]
    net[0].settings = {"me": net[0]}
    before = graph_key(net, X)[0]
    assert graph_key(net, X)[0] == before
    net[0].weight.data = net[0].weight.data.clone()
    assert graph_key(net, X)[0] != before


def test_a_number_whose_memory_was_given_back_has_a_key():
    """Bug: the key read it at address zero. Offloaded parameters lose their storage."""
    net = Adapted()
    before = graph_key(net, X)[0]
    net.strength.untyped_storage().resize_(0)
    assert graph_key(net, X)[0] != before


CHANGED_WHILE_READ = """
import sys, torch
from dlms_engine.engine.cuda_graph_cache import graph_key

class Kind(type):
    def __getattr__(cls, name):  # called where a key looks at the type
        change()
        raise AttributeError(name)

class Odd(metaclass=Kind):
    pass

def change():
    global junk
    what = sys.argv[1]
    if what == "list":
        net.things.clear()
    elif what == "dict":
        net.things.clear()
        net.things.update({n: str(n) * n for n in range(40)})
    elif what == "attributes":
        net.__dict__.pop("things", None)
        net.__dict__["_modules"] = {}
    junk = [bytearray(n) for n in range(16, 4000)]

net = torch.nn.Sequential(torch.nn.Linear(2, 2))
more = {f"key {n}": f"value {n}" for n in range(400)}
if sys.argv[1] == "list":
    net.things = [Odd(), *more]
elif sys.argv[1] == "dict":
    net.things = {Odd(): [1.5, "text"], **more}
else:
    net.things = [Odd(), *more]
assert len(graph_key(net, {"x": torch.zeros(3)})[0]) > 100
print("alive")
"""


@pytest.mark.parametrize("what", ["list", "dict", "attributes", "nothing"])
def test_what_changes_while_it_is_read_is_never_memory_that_is_gone(what):
    """Bug: a list that shrank under the key was read on. Other threads may change a network, too."""
    environment = {**os.environ, "PYTHONMALLOC": "debug"}  # freed memory is overwritten
    done = subprocess.run(
        [sys.executable, "-c", CHANGED_WHILE_READ, what],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_a_parameter_on_another_device_is_named():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert graph_key(net, X)[1] == ""
    net[1].to("meta")
    assert graph_key(net, X)[1] == "1.weight"
    # A policy may lie elsewhere before its first run, which moves it.
    assert graph_key(nn.Linear(1, 1), X, (), (net,))[1] == ""


def test_tensors_kept_as_attributes_can_be_left_out():
    net = nn.Sequential(Adapted())
    cuda_graph_cache.ignore_tensor_attributes(net)
    before = graph_key(net, X)[0]
    net[0].table = torch.ones(2)
    assert graph_key(net, X)[0] == before
    net[0].weight.data = net[0].weight.data.clone()
    assert graph_key(net, X)[0] != before


def test_numbers_are_not_reused_after_the_object_is_gone():
    seen = {cuda_graph_cache.token(nn.Identity()) for _ in range(50)}  # Python reuses addresses
    assert len(seen) == 50


def test_split_tensors():
    tree = {"a": torch.ones(2), "b": [torch.zeros(1), 3], "c": None}
    tensors, rest, rebuild = split_tensors(tree)
    assert len(tensors) == 2
    again = rebuild({k: t + 1 for k, t in tensors.items()})
    assert torch.equal(again["a"], torch.full((2,), 2.0)) and again["b"][1] == 3
    assert split_tensors({"a": torch.ones(2), "b": [torch.zeros(1), 4], "c": None})[1] != rest
    assert split_tensors({})[:2] == ({}, ())


class Mode(enum.Enum):
    ON = 1
    OFF = 2


@dataclasses.dataclass
class Region:
    scale: float = 1.0
    mask: Any = None


PAIRS: dict[str, tuple[Any, Any]] = {
    "complex": (1 + 2j, 1 + 3j),
    "set": ({1, 2}, {1, 3}),
    "frozenset": (frozenset({1}), frozenset({2})),
    "number of numpy's": (np.float32(1.5), np.float32(2.5)),
    "integer of numpy's": (np.int64(3), np.int64(4)),
    "array": (np.ones(3), np.zeros(3)),
    "enum": (Mode.ON, Mode.OFF),
    "decimal": (decimal.Decimal("1.5"), decimal.Decimal("2.5")),
    "range": (range(3), range(4)),
    "slice": (slice(1, 2), slice(1, 3)),
    "dataclass": (Region(), Region(2.0)),
    "tensor in a dataclass": (Region(mask=X["x"]), Region(mask=torch.ones(3))),
    "slots": (Slotted(1.0), Slotted(2.0)),
    "bytearray": (bytearray(b"a"), bytearray(b"b")),
    "text": ("a", "b"),
    "none": (None, ...),
    "type": (int, float),
    "function": (hook, len),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_conditions_of_any_kind_have_a_key(kind):
    """Those without weak references or a hash ended the run with a TypeError."""

    def with_condition(value: Any) -> Any:
        _, rest, _ = split_tensors({"mode": value, "deep": [{"er": value}]})
        return graph_key(len, X, rest)[0]

    one, other = PAIRS[kind]
    assert with_condition(one) == with_condition(one)
    assert with_condition(one) != with_condition(other)


def test_the_compiled_key_is_several_times_cheaper_than_pythons(graph_backend):
    """It is made before every run of the embedded model, which takes a millisecond on a GPU."""
    if graph_backend == "python":
        pytest.skip("compares the two")
    net = nn.Sequential(*[nn.Sequential(Adapted(), nn.SiLU(), nn.LayerNorm(2)) for _ in range(40)])

    def best(make: Callable[..., Any]) -> float:
        times = []
        for _ in range(9):
            start = time.thread_time()
            for _ in range(5):
                make(1, X, (), (net,), True)
            times.append(time.thread_time() - start)
        return min(times)

    assert best(native.graph_key) < best(python_key) / 3

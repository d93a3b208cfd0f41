"""When two runs share a CUDA graph, and which graphs are kept; no GPU is needed."""

from __future__ import annotations

import collections
import copy
import dataclasses
import decimal
import enum
import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.modules.module as every_module
from torch import Tensor, nn

from dlms_engine.engine import cuda_graph_cache
from dlms_engine.engine.cuda_graph_cache import GraphCache, graph_key, split_tensors
from dlms_engine.engine.cuda_graph_fallback import PythonCache, python_key
from dlms_engine.engine.native import native

BACKENDS = ["python", *(["native"] if native is not None else [])]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch) -> str:
    """Every test here holds for the compiled cache and for its replacement in Python."""
    if request.param == "python":
        monkeypatch.setattr(cuda_graph_cache, "native", None)
    return str(request.param)


X = {"x": torch.zeros(3)}


def key(n: int, **options: Any) -> Any:
    return graph_key(len, {"x": torch.zeros(n + 1)}, **options)[0]


def fill(cache: GraphCache, n: int, nbytes: int = 1, value: Any = None) -> Any:
    """What `run_captured` does: look, claim, make, put."""
    found = cache.runs.find(key(n))
    if found is None:
        claim, found, _ = cache.runs.claim(key(n))
        if claim == "mine":
            found = object() if value is None else value
            cache.runs.put(key(n), key(n), found, nbytes)
    return found


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


class Processor:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Adapted(nn.Linear):
    """As PEFT's layers: settings in plain attributes, lists and dicts; a processor object."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaling = {"default": 1.0}
        self._active_adapter = ["default"]
        self._disable_adapters = False
        self.processor = Processor(1.0)
        self.b1 = 1.1
        self.table = torch.zeros(2)
        self.skipped = {1, "up"}
        self.recent = collections.deque([1, 2])
        self.factor = np.float32(1.0)
        self.factors = np.ones(3)
        self.phase = 1 + 2j
        self.window = range(4)
        self.call = functools.partial(pow, 2)
        self.slotted = Slotted(1.0)


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


def test_a_network_inside_a_function_is_seen(backend):
    if backend == "python":
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


def test_the_compiled_key_is_several_times_cheaper_than_pythons(backend):
    """It is made before every run of the embedded model, which takes a millisecond on a GPU."""
    if backend == "python":
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


# -- the cache -------------------------------------------------------------------------------------


def test_made_once_and_least_recently_used_goes_first():
    cache = GraphCache(max_entries=2)
    for n in (0, 1, 0, 2, 0, 1):
        fill(cache, n)
    assert cache.stats() == {
        "captures": 4,
        "replays": 2,
        "evictions": 2,
        "failures": 0,
        "entries": 2,
        "bytes": 2,
        "gain": None,
    }
    assert key(0) in cache and key(1) in cache and key(2) not in cache


def test_memory_bound_and_the_newest_stays():
    """Bug: an entry beyond the bound was dropped, and captured again in every run."""
    cache = GraphCache(max_bytes=100, max_entries=9)
    for n in range(4):
        fill(cache, n, 40)
    assert len(cache) == 2 and cache.nbytes == 80
    fill(cache, 9, 101)
    assert len(cache) == 1 and key(9) in cache and cache.nbytes == 101
    fill(cache, 3, 40)
    assert key(3) in cache and key(9) not in cache
    cache.max_bytes = 0
    assert len(cache) == 1


def test_failures_are_remembered_until_invalidated():
    cache = GraphCache()
    assert cache.runs.claim(key(0))[0] == "mine"
    cache.runs.fail(key(0), "host read", False)
    assert cache.failure(key(0)) == "host read" and cache.failure(key(1)) is None
    assert cache.runs.claim(key(0)) == ("failed", None, "host read")
    cache.invalidate(len)
    assert cache.failure(key(0)) is None
    assert cache.runs.claim(key(0))[0] == "mine"


def test_a_coarse_failure_holds_whatever_the_modules_hold():
    net, cache = nn.Sequential(Adapted()), GraphCache()
    first = graph_key(net, X)[0]
    assert cache.runs.claim(first)[0] == "mine"
    cache.runs.fail(first, "it counts", True)
    net[0].b1 = 2.0
    assert cache.failure(graph_key(net, X)[0]) == "it counts"
    assert cache.failure(graph_key(net, X, (1,))[0]) is None


def test_invalidate_one_network_or_all():
    cache, nets = GraphCache(), [nn.Linear(1, 1) for _ in range(2)]
    keys = [graph_key(net, X)[0] for net in nets]
    for each in keys:
        cache.runs.claim(each)
        cache.runs.put(each, each, object(), 5)
    cache.invalidate(nets[0])
    assert keys[0] not in cache and keys[1] in cache and cache.nbytes == 5
    cache.invalidate(nn.Linear(1, 1))  # one that was never seen
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0


def test_what_was_invalidated_while_it_was_made_is_not_kept():
    cache = GraphCache()
    assert cache.runs.claim(key(0))[0] == "mine"
    cache.invalidate(len)
    cache.runs.put(key(0), key(0), object(), 1)
    assert key(0) not in cache and cache.stats()["captures"] == 1
    assert cache.runs.claim(key(0))[0] == "mine"  # and can be made again


def test_gain():
    cache = GraphCache()
    for n, (plain, graph) in enumerate([(3e-3, 1e-3), (5e-3, 3e-3)]):
        fill(cache, n)
        cache.runs.measured(key(n), plain, graph)
    assert cache.stats()["gain"] == pytest.approx(2.0)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_start_empty(again):
    cache = GraphCache(max_bytes=7, max_entries=3, verify=2)
    fill(cache, 0)
    other = again(cache)
    assert len(other) == 0 and len(cache) == 1
    assert (other.max_bytes, other.max_entries, other.verify) == (7, 3, 2)


def test_values_are_let_go():
    class Value:
        gone = 0

        def __del__(self) -> None:
            Value.gone += 1

    cache = GraphCache(max_entries=1)
    for n in range(3):
        fill(cache, n, value=Value())
    assert Value.gone == 2
    cache.clear()
    assert Value.gone == 3


def test_threads_make_an_entry_once_and_others_go_on_meanwhile():
    """Bug: the lock was held during a capture, so that other graphs waited."""
    cache, made, waited = GraphCache(), [], []
    fill(cache, 1)
    start, making, go_on = threading.Barrier(5), threading.Event(), threading.Event()

    def work() -> None:
        start.wait()
        while True:
            claim, value, _ = cache.runs.claim(key(0))
            if claim == "mine":
                making.set()
                go_on.wait(20)
                made.append(1)
                cache.runs.put(key(0), key(0), object(), 1)
                return
            if value is not None:
                waited.append(claim)
                return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    start.wait()
    assert making.wait(20)
    begin = time.perf_counter()
    assert fill(cache, 1) is not None and fill(cache, 2) is not None
    assert time.perf_counter() - begin < 5
    go_on.set()
    for t in threads:
        t.join(20)
    assert len(made) == 1 and waited == ["found"] * 3


def test_many_threads_on_one_small_cache():
    """Finds, makes, evictions and invalidations at once; the counts add up afterwards."""
    cache, wrong = GraphCache(max_bytes=30, max_entries=4), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for n in torch.randint(0, 8, (150,), generator=generator).tolist():
            claim, value = "again", cache.runs.find(key(n))
            while value is None and claim == "again":
                claim, value, _ = cache.runs.claim(key(n))
            if claim == "mine":
                value = ("value", n)
                cache.runs.put(key(n), key(n), value, 10)
            if value != ("value", n):
                wrong.append((n, value))
            if n == 7:
                cache.invalidate()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stats = cache.stats()
    assert wrong == [] and stats["entries"] <= 4 and stats["bytes"] == 10 * stats["entries"]
    assert stats["captures"] + stats["replays"] == 6 * 150


@pytest.mark.parametrize(
    "bounds", [{"max_bytes": -1}, {"max_entries": 0}, {"verify": -1}, {"loop": "sometimes"}]
)
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match="expected"):
        GraphCache(**bounds)


def test_the_replacement_has_every_method_of_the_compiled_cache():
    if native is None:
        pytest.skip("needs the compiled part")
    names = {n for n in dir(native.GraphCache) if not n.startswith("_")}
    assert names <= set(dir(PythonCache(1, 1)))
    assert callable(python_key)

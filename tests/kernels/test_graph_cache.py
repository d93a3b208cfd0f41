"""Which captured runs are kept, under keys that are numbers here; no GPU is needed."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from graph_cases import Adapted, X, key
from torch import nn

from dlms_engine.engine.cuda_graph_cache import GraphCache, graph_key
from dlms_engine.engine.cuda_graph_fallback import PythonCache, python_key
from dlms_engine.engine.native import native
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.processes import EDM

pytestmark = pytest.mark.usefixtures("graph_backend")


def fill(cache: GraphCache, n: int, nbytes: int = 1, value: Any = None) -> Any:
    """What `run_captured` does: look, claim, make, put."""
    found = cache.runs.find(key(n))
    if found is None:
        claim, found, _ = cache.runs.claim(key(n))
        if claim == "mine":
            found = object() if value is None else value
            cache.runs.put(key(n), key(n), found, nbytes)
    return found


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_weights_of_a_scripted_network_that_move_change_the_key(kind, inside):
    """They lie in C++; the graph of before read memory that was free."""
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    made = torch.jit.script(layer) if kind == "script" else torch.jit.trace(layer, torch.ones(2, 2))
    net = nn.Sequential(made, nn.ReLU()) if inside else made
    denoiser = Denoiser(net, EDM(), "data")
    net(torch.ones(2, 2))  # the first call fills in attributes
    before = graph_key(denoiser, X)[0]
    with torch.no_grad():
        next(net.parameters()).add_(1)
    net(torch.ones(2, 2))
    assert graph_key(denoiser, X)[0] == before
    net.double()
    assert graph_key(denoiser, X)[0] != before


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


def test_invalidate_the_network_inside_of_denoisers():
    cache, network = GraphCache(), nn.Identity()
    denoisers = [Denoiser(each, EDM(), "data") for each in (network, network, nn.Identity())]
    keys = [graph_key(each, X)[0] for each in denoisers]
    for each in keys:
        cache.runs.claim(each)
        cache.runs.put(each, each, object(), 5)
    cache.invalidate(network)
    assert [each in cache for each in keys] == [False, False, True]


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

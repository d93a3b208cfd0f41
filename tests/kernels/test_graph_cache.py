"""When two runs share a CUDA graph, and which graphs are kept; no GPU is needed."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dlms_engine.engine.cuda_graph_cache import GraphCache, graph_key, identity


@dataclass(frozen=True)
class Held:
    nbytes: int


def key(n: int):
    return graph_key(len, {"x": torch.zeros(n + 1)})


def test_equal_runs_share_a_key_whatever_the_values():
    net = nn.Linear(2, 2)
    keys = {graph_key(net, {"x": torch.randn(3), "y": torch.zeros(2)}, (4,)) for _ in range(3)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(4)},
        {"x": torch.zeros(3, dtype=torch.float64)},
        {"x": torch.zeros(3, device="meta")},
        {"z": torch.zeros(3)},
        {"x": torch.zeros(3), "y": torch.zeros(1)},
    ],
    ids=["shape", "dtype", "device", "name", "more"],
)
def test_what_changes_the_key(other):
    assert graph_key(len, other) != graph_key(len, {"x": torch.zeros(3)})


def test_options_autocast_and_network_change_the_key():
    inputs = {"x": torch.zeros(3)}
    base = graph_key(len, inputs, (1,))
    assert graph_key(len, inputs, (2,)) != base
    assert graph_key(max, inputs, (1,)) != base
    torch.set_autocast_enabled("cuda", True)  # the context manager refuses without a GPU
    try:
        assert graph_key(len, inputs, (1,)) != base
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_identity_of_a_module():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    before = identity(net)
    with torch.no_grad():
        net[0].weight.mul_(2)  # in place: a graph sees it
    assert identity(net) == before
    net.eval()
    assert identity(net) != before
    net.train()
    assert identity(net) == before
    net[0].weight.data = net[0].weight.data.clone()  # what .to() does
    assert identity(net) != before
    assert identity(copy.deepcopy(net)) != identity(net)


def test_identity_is_not_reused_after_the_object_is_gone():
    seen = set()
    for _ in range(50):
        seen.add(identity(nn.Identity())[0])  # Python reuses the addresses
    assert len(seen) == 50


def test_made_once_and_least_recently_used_goes_first():
    cache, made = GraphCache(max_entries=2), []

    def get(n: int) -> None:
        cache.get(key(n), lambda: made.append(n) or Held(1))  # type: ignore[func-returns-value]

    for n in (0, 1, 0, 2, 0, 1):
        get(n)
    assert made == [0, 1, 2, 1]
    assert key(0) in cache and key(1) in cache and key(2) not in cache


def test_memory_bound():
    cache = GraphCache(max_bytes=100, max_entries=9)
    for n in range(4):
        cache.get(key(n), lambda: Held(40))
    assert len(cache) == 2 and cache.nbytes == 80
    huge = cache.get(key(9), lambda: Held(101))
    assert huge == Held(101) and cache.nbytes <= 100 and key(9) not in cache


def test_a_failed_capture_is_not_kept_and_the_failure_is_remembered():
    cache = GraphCache()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.get(key(0), fails)
    assert len(cache) == 0 and cache.failure(key(0)) is None
    cache.fail(key(0), "host read")
    assert cache.failure(key(0)) == "host read" and cache.failure(key(1)) is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_start_empty(again):
    cache = GraphCache(max_bytes=7, max_entries=3)
    cache.get(key(0), lambda: Held(1))
    other = again(cache)
    assert len(other) == 0 and (other.max_bytes, other.max_entries) == (7, 3) and len(cache) == 1


def test_threads_make_an_entry_once():
    cache, made, start = GraphCache(), [], threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(20):
            cache.get(key(0), lambda: made.append(1) or Held(1))  # type: ignore[func-returns-value]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 1


@pytest.mark.parametrize("bounds", [{"max_bytes": -1}, {"max_entries": 0}])
def test_bad_bounds(bounds):
    with pytest.raises(ValueError, match="expected"):
        GraphCache(**bounds)

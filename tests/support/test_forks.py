"""A child that is forked while threads sample neither waits for ever nor meets the parent's loops."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from dlms_engine import Sampler, grids, processes, solvers
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.steps import EnginePool
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.support import allocator, forks

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    # Python 3.12 warns of what is tried here.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
EDM = processes.EDM()
FORKS = 6


def sampler() -> Sampler:
    denoiser = Denoiser(lambda x, t: x / (1 + t.reshape(-1, 1)), EDM, "data")
    return Sampler(denoiser, solvers.ipndm(EDM, grids.polynomial(EDM, 4)))


def in_child(work: object, seconds: float = 20.0) -> int | None:
    """Exit code of a forked child that calls ``work``; None if it had to be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)  # type: ignore[operator]
        except BaseException:
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


def test_forks_while_threads_sample() -> None:
    held = sampler()
    want = held.sample([0, 1], (3,))
    stop = threading.Event()

    def work() -> None:
        sizes = [2, 3, 5]
        while not stop.is_set():
            held.sample(range(sizes[0]), (3,))
            sizes.append(sizes.pop(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        codes = [
            in_child(lambda: torch.equal(held.sample([0, 1], (3,)), want)) for _ in range(FORKS)
        ]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert codes == [0] * FORKS


def locked(lock: Any, work: object) -> int | None:
    """What a child meets that is forked while another thread holds the lock."""
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(60)
    try:
        return in_child(work, seconds=2.0)
    finally:
        leave.set()
        thread.join()


def test_a_lock_that_another_thread_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = sampler()
    locks = held._engines._lock, allocator._users.lock

    def samples() -> object:
        with allocator.freed_memory_kept():
            return held.sample([0], (3,)).isfinite().all()

    assert [locked(lock, samples) for lock in locks] == [0, 0]
    monkeypatch.setattr(forks, "_living", weakref.WeakSet())  # planted: nothing is renewed
    assert [locked(lock, samples) for lock in locks] == [None, None]


def test_a_child_starts_without_loops_and_graphs() -> None:
    pool, cache = EnginePool(), GraphCache(max_bytes=1 << 20, max_entries=3)
    loop, runs = object(), cache.runs
    pool._free["key",] = loop

    def work() -> bool:
        fresh = cache.runs is not runs and (cache.max_bytes, cache.max_entries) == (1 << 20, 3)
        return fresh and not pool._free

    assert in_child(work) == 0
    assert pool._free and cache.runs is runs


def test_first_call_under_inference_mode_spoils_no_later_one() -> None:
    """The loop's buffers were made under it: a callback could never write into them afterwards."""
    held = sampler()
    x = 80 * torch.ones(2, 3)
    with torch.inference_mode():
        want = held(x)

    def nothing(step: object) -> None:
        state: Tensor = step.x  # type: ignore[attr-defined]
        state.mul_(1.0)

    assert torch.equal(held(x, callback=nothing), want)
    out = held(x).requires_grad_()
    out.square().sum().backward()
    assert torch.equal(out.grad, 2 * out.detach())
    assert not any(part.is_inference() for plan in held._plans.values() for part in plan)

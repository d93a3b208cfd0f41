"""A run's state lives in the run: threads, copies, pickles."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
from dlms_engine.integrations.diffusers import DLMSScheduler
from dlms_engine.integrations.scheduler.runs import SchedulerRuns

pytestmark = pytest.mark.filterwarnings("ignore")
CALLERS, STEPS = 8, 12


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def sample(scheduler: Any, seed: int) -> Tensor:
    """One run; the scheduler is shared with whoever else calls this."""
    scheduler.set_timesteps(STEPS)
    x = noise(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * torch.sin(x) + 0.2 * x, t, x, return_dict=False)[0]
    return x


def together(scheduler: Any) -> list[Any]:
    """Every caller's own result, or its error."""
    barrier = threading.Barrier(CALLERS)

    def caller(seed: int) -> Any:
        barrier.wait()
        try:
            return sample(scheduler, seed)
        except Exception as exc:  # mixed-up runs fail wherever they happen to meet
            return exc

    with ThreadPoolExecutor(CALLERS) as pool:
        return list(pool.map(caller, range(CALLERS)))


def test_threads_that_share_a_scheduler_get_their_own_results() -> None:
    scheduler = DLMSScheduler(solver="unipc")
    expected = [sample(scheduler, seed) for seed in range(CALLERS)]
    found = together(scheduler)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_one_run_for_all_threads_would_mix_them_up(monkeypatch: Any) -> None:
    """Planted fault: the state on the scheduler, where it was."""
    monkeypatch.setattr(SchedulerRuns, "current", lambda self: self._newest)
    monkeypatch.setattr(SchedulerRuns, "stepping", lambda self: self._newest)
    scheduler = DLMSScheduler(solver="unipc")
    expected = [sample(scheduler, seed) for seed in range(CALLERS)]
    wrong = 0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):  # threads may happen to take turns
            found = together(scheduler)
            pairs = zip(expected, found, strict=True)
            wrong += sum(not (isinstance(b, Tensor) and torch.equal(a, b)) for a, b in pairs)
            if wrong:
                break
    finally:
        sys.setswitchinterval(interval)
    assert wrong > 0


def test_a_run_begun_by_another_thread_is_refused() -> None:
    scheduler = DLMSScheduler()
    scheduler.set_timesteps(3)
    scheduler.step(noise(0), scheduler.timesteps[0], noise(0))
    errors: list[str] = []

    def intruder() -> None:
        try:
            scheduler.step(noise(0), scheduler.timesteps[1], noise(0))
        except ValueError as exc:
            errors.append(str(exc))

    thread = threading.Thread(target=intruder)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]


def test_a_run_that_nobody_steps_may_be_taken_over() -> None:
    """``set_timesteps`` in one thread and the loop in another."""
    scheduler = DLMSScheduler(solver="unipc")
    expected = sample(scheduler, 0)
    scheduler.set_timesteps(STEPS)
    ends: list[Tensor] = []

    def loop() -> None:
        x = noise(0)
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * torch.sin(x) + 0.2 * x, t, x, return_dict=False)[0]
        ends.append(x)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert torch.equal(ends[0], expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_where_the_run_is(way: str) -> None:
    scheduler = DLMSScheduler(solver="unipc", solver_order=3)
    scheduler.set_timesteps(8)
    x = noise(0)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    other = pickle.loads(pickle.dumps(scheduler)) if way == "pickle" else copy.deepcopy(scheduler)
    assert other.step_index == 4
    ends: list[Tensor] = []

    def go_on(one: Any) -> None:
        y = x
        for t in one.timesteps[4:]:
            y = one.step(0.1 * y, t, y, return_dict=False)[0]
        ends.append(y)

    go_on(scheduler)
    thread = threading.Thread(target=go_on, args=(other,))  # a copy may move to another thread
    thread.start()
    thread.join()
    assert len(ends) == 2 and torch.equal(*ends)

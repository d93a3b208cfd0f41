"""One sampler in two threads, copies of a sampler, and when its runs share a captured graph."""

from __future__ import annotations

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from cli_model import TinyNetwork
from standin_driver import StandinCapture
from torch import Tensor, nn

from dlms_engine import grids, ops, processes, solvers
from dlms_engine.engine import sampler
from dlms_engine.engine.cuda_graph_cache import GraphCache
from dlms_engine.engine.sampler import Sampler, seeded_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

EDM = processes.EDM()
GRID = grids.polynomial(EDM, 4)
SHAPE = (3, 8, 8)
THREADS = 2


def noise(first: int, batch: int = 3) -> Tensor:
    return seeded_noise(range(first, first + batch), SHAPE, 80.0)


def designer_policy() -> DesignerPolicy:
    weights = torch.zeros(4, 3, dtype=torch.float64)
    weights[:, 0] = 1
    designer = Designer(DesignerSettings(4, 3, True, "data", features=64), EDM, GRID, weights)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(designer.head.weight, std=0.1)
    return DesignerPolicy(designer)


def table(order: int = 3):
    return solvers.ipndm(EDM, GRID, order=order, afs=True)


POLICIES = {"table": table, "dlms": designer_policy}


class Meeting(TinyNetwork):
    """Waits in every evaluation until all threads have made their bottleneck."""

    barrier: threading.Barrier | None = None

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        out = super().forward(x, c_noise)
        if Meeting.barrier is not None:
            Meeting.barrier.wait(timeout=60)
        return out


def make(policy: str, backend: str, network: type[nn.Module] = Meeting) -> Sampler:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        held = network().eval().requires_grad_(False)
    denoiser = Denoiser(held, EDM, "edm", features="mid_block")
    return Sampler(denoiser, POLICIES[policy](), backend=backend)


def concurrently(held: Sampler) -> list[list[Tensor]]:
    """Three samples of every thread, each evaluation of all threads at the same time."""
    results: list[list[Tensor]] = [[] for _ in range(THREADS)]
    errors: list[Exception] = []
    barrier = Meeting.barrier = threading.Barrier(THREADS)

    def work(i: int) -> None:
        try:
            for run in range(3):
                results[i].append(held(noise(100 * i + 10 * run)))
        except Exception as exc:
            errors.append(exc)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Meeting.barrier = None
    if errors:
        raise errors[0]
    return results


def one_by_one(held: Sampler) -> list[list[Tensor]]:
    return [[held(noise(100 * i + 10 * run)) for run in range(3)] for i in range(THREADS)]


def same(got: list[list[Tensor]], want: list[list[Tensor]]) -> bool:
    pairs = [(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True)]
    return all(torch.equal(g, w) for g, w in pairs)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_threads_through_one_sampler(policy, backend):
    held = make(policy, backend)
    assert same(concurrently(held), one_by_one(held))


def test_that_check_sees_a_bottleneck_shared_by_the_threads():
    held = make("dlms", "auto")
    held.denoiser._tap._held = SimpleNamespace()
    assert not same(concurrently(held), one_by_one(held))


def test_that_check_sees_a_loop_shared_by_the_threads():
    held = make("table", "auto")
    if ops.select("auto").name != "cpu":
        pytest.skip("built without the compiled loop")

    class NeverOut(dict):
        def pop(self, key, default=None):
            return self.get(key, default)

        def popitem(self, last=True):
            return super().popitem()

    held(noise(0))
    held._engines._free = NeverOut(held._engines._free)
    with pytest.raises(RuntimeError, match="running already"):  # the loop notices by itself
        concurrently(held)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("policy", POLICIES)
def test_copies_start_without_loops_and_give_the_same_bits(policy, again):
    held = make(policy, "auto")
    want = held(noise(0))
    other = again(held)
    assert not other._engines._free
    assert other.denoiser.network is not held.denoiser.network
    assert torch.equal(other(noise(0)), want)
    with torch.no_grad():
        other.denoiser.network.out.bias.add_(1)  # the copy's own
    assert torch.equal(held(noise(0)), want) and not torch.equal(other(noise(0)), want)


class Replayed:
    """(sampler, x, cond) -> sample, as on a GPU; counts the captures in ``made``."""

    def __init__(self, capture: StandinCapture) -> None:
        self._capture = capture

    @property
    def made(self) -> int:
        return self._capture.made

    def __call__(self, held: Sampler, x: Tensor, **cond) -> Tensor:
        with torch.no_grad():
            return held._run_graph(x.clone(), torch.float32, ops.select("eager"), cond)


@pytest.fixture
def replayed(captured, monkeypatch) -> Replayed:
    monkeypatch.setattr(sampler, "GRAPHS", GraphCache())
    return Replayed(captured)


def test_new_tables_of_one_shape_replay_one_capture(replayed):
    held = make("table", "eager", TinyNetwork)
    for other in (table(), solvers.ipndm(EDM, grids.logsnr(EDM, 4), order=3, afs=True)):
        again = Sampler(held.denoiser, other, backend="eager")
        assert torch.equal(replayed(again, noise(5)), again(noise(5)))
    assert replayed.made == 1
    shorter = Sampler(held.denoiser, table(order=2), backend="eager")  # two slots: another graph
    assert torch.equal(replayed(shorter, noise(5)), shorter(noise(5)))
    assert replayed.made == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_are_captured_again(replayed, policy):
    held = make(policy, "eager", TinyNetwork)
    for _ in range(2):
        replayed(held, noise(0))
    assert replayed.made == 1
    other = pickle.loads(pickle.dumps(held))
    with torch.no_grad():
        other.denoiser.network.out.bias.add_(1)
    assert torch.equal(replayed(other, noise(0)), other(noise(0)))
    assert replayed.made == 2


def test_another_designer_is_another_capture(replayed):
    held = make("dlms", "eager", TinyNetwork)
    other = Sampler(held.denoiser, designer_policy(), backend="eager")
    nn.init.zeros_(other.policy.designer.head.weight)
    for each in (held, other):
        assert torch.equal(replayed(each, noise(0)), each(noise(0)))
    assert replayed.made == 2


class Conditioned(TinyNetwork):
    def forward(self, x: Tensor, c_noise: Tensor, added=None, label=None, gain=1.0) -> Tensor:
        out = super().forward(x, c_noise)
        for value in (None if added is None else added["shift"], label):
            out = out if value is None else out + gain * value[:, None, None, None]
        return out


def test_what_the_network_is_given_inside_a_dict_is_an_input_of_the_graph(replayed):
    """Bug: only its repr was looked at, which leaves out most of a large tensor."""
    held = make("table", "eager", Conditioned)
    for value in (1.0, 2.0):
        shift = torch.full((2000,), 1.0)
        shift[1000] = value  # repr shows the first and last three
        x = torch.zeros(2000, 3, 8, 8)
        cond = {"added": {"shift": shift}}
        assert torch.equal(replayed(held, x, **cond), held(x, **cond))
    assert replayed.made == 1
    for gain in (0.5, 0.25, 0.25):
        cond = {"added": {"shift": torch.ones(3)}, "gain": gain}
        assert torch.equal(replayed(held, noise(0), **cond), held(noise(0), **cond))
    assert replayed.made == 3


def test_another_unconditional_branch_is_another_capture(replayed):
    held = make("table", "eager", Conditioned)
    guided = Denoiser(
        held.denoiser.network,
        EDM,
        "edm",
        guidance_scale=3.0,
        unconditional={"label": torch.zeros(1, dtype=torch.float64)},  # copied as float32
    )
    run = Sampler(guided, table(), backend="eager")
    label = torch.ones(3)
    for change in (0.0, 0.0, 1.0):
        if change:
            guided.unconditional["label"].add_(change)
        got = replayed(run, noise(0), label=label)
        assert torch.equal(got, run(noise(0), label=label))
    assert replayed.made == 2


@pytest.mark.parametrize("mode", ["always", "auto"])
def test_one_captured_loop_serves_any_number_of_evaluations(replayed, captured, mode):
    sampler.GRAPHS.loop = mode
    held = make("table", "eager", TinyNetwork)
    for nfe in (4, 3, 7):
        grid = grids.polynomial(EDM, nfe)
        again = Sampler(held.denoiser, solvers.ipndm(EDM, grid, order=3), backend="eager")
        for first in (0, 5):
            assert torch.equal(replayed(again, noise(first)), again(noise(first)))
    if mode == "always":
        assert captured.loops == 1 and captured.made == 0
    else:  # whichever was measured to be faster
        assert captured.loops == 1 and captured.made in (1, 4)


def test_a_loop_has_a_largest_number_of_steps(replayed, captured, monkeypatch):
    monkeypatch.setattr("dlms_engine.engine.cuda_graph_capture.MAX_STEPS", 2)
    sampler.GRAPHS.loop = "always"
    held = make("table", "eager", TinyNetwork)
    assert torch.equal(replayed(held, noise(0)), held(noise(0)))
    assert captured.loops == 0 and captured.made == 1


def test_a_learned_policy_follows_the_network():
    """Bug: it was moved in the first run, which torch.compile cannot do."""
    denoiser = Denoiser(TinyNetwork(), EDM, "edm", features="mid_block")
    policy = designer_policy()
    held = Sampler(denoiser, policy)
    assert policy.grid.device.type == "cpu"
    held.to("meta")
    assert policy.grid.device.type == "meta"
    elsewhere = designer_policy()
    Sampler(denoiser, elsewhere)
    assert elsewhere.grid.device.type == "meta"


def test_a_loop_that_is_wrong_is_not_kept(replayed, captured, monkeypatch):
    """Each is held against the plain run when it is captured."""
    sampler.GRAPHS.loop = "always"
    monkeypatch.setattr(
        "dlms_engine.engine.cuda_graph.LoopedRun.__call__",
        lambda self, inputs: torch.zeros_like(inputs["x"]),
    )
    held = make("table", "eager", TinyNetwork)
    assert torch.equal(replayed(held, noise(0)), held(noise(0)))
    assert sampler.GRAPHS.stats()["failures"] == 1 and captured.made == 1

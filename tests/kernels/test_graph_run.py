"""GraphRun in C++: copies in, one launch, copy out; on a stand-in of the driver."""

from __future__ import annotations

import threading

import pytest
import torch
from standin_driver import Standin

from dlms_engine.engine.native import native


def make(driver: Standin):
    """(run, buffers, output): output = 2 * a + b."""
    a, b, out = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    half = torch.zeros(3)
    graph = driver.graph(lambda: half.copy_(2 * a), lambda: out.copy_(half + b))
    return native.GraphRun(graph, (a, b), out, 0), (a, b), out


def test_inputs_go_in_and_the_result_comes_out(driver):
    run, _, buffer = make(driver)
    for n in range(3):
        a, b, out = torch.full((3,), float(n)), torch.arange(3.0), torch.empty(3)
        run.launch((a, b), out, 0)
        assert torch.equal(out, 2 * a + b) and torch.equal(buffer, out)
    assert run.nodes == 2 and run.launches == 3


def test_what_a_run_enqueues(driver):
    """Bug: memcpy nodes were bound to new addresses, after which the driver sent the whole graph to
    the device again: 430 us a run of 1,100 nodes."""
    run, _, _ = make(driver)
    a, b, out = torch.ones(3), torch.ones(3), torch.empty(3)
    expected = {
        "cuStreamWaitEvent": 1,
        "cuMemcpyDtoDAsync_v2": 3,
        "cuGraphLaunch": 1,
        "cuEventRecord": 1,
        "cuGraphInstantiateWithFlags": 0,
        "cuGraphUpload": 0,
    }
    for _ in range(2):
        before = {name: driver.calls(name) for name in expected}
        run.launch((a, b), out, 0)
        assert {name: driver.calls(name) - before[name] for name in expected} == expected
    a.fill_(5.0)  # the same address, another value
    run.launch((a, b), out, 0)
    assert torch.equal(out, torch.full((3,), 11.0)) and driver.depth() == 0


@pytest.mark.parametrize("failing", ["cuGraphLaunch", "cuMemcpyDtoDAsync_v2", None])
def test_a_run_waits_for_all_of_the_one_before(driver, failing):
    """They share the buffers, whatever their streams; also after one that failed half-way."""
    run, _, _ = make(driver)
    a, b, out = torch.ones(3), torch.ones(3), torch.empty(3)
    run.launch((a, b), out, 0)
    unordered = driver.unordered()
    for stream in (1, 2, 2, 1):
        if failing is not None:
            driver.fail(failing, 1)
            with pytest.raises(native.DriverError):
                run.launch((a, b), out, stream)
            driver.fail(failing, 0)
        run.launch((a, b), out, stream)
    assert driver.unordered() == unordered
    driver.fail("cuEventRecord", 1)  # a planted fault: a run that leaves no mark
    with pytest.raises(native.DriverError, match="cuEventRecord"):
        run.launch((a, b), out, 1)
    driver.fail("cuEventRecord", 0)
    run.launch((a, b), out, 2)
    assert driver.unordered() == unordered + 1


def test_destroyed_with_its_owner(driver):
    before = driver.alive()
    run, _, _ = make(driver)
    assert driver.alive() == before + 3  # the capture, what was instantiated, an event
    del run
    assert driver.alive() == before + 1


def test_the_buffers_live_as_long_as_the_run(driver):
    run, buffers, _ = make(driver)
    addresses = [t.data_ptr() for t in buffers]
    del buffers
    assert not {torch.zeros(3).data_ptr() for _ in range(64)} & set(addresses)
    run.launch((torch.ones(3), torch.ones(3)), torch.empty(3), 0)


def test_an_empty_capture_is_refused(driver):
    """Bug: a capture on another device than its stream's records nothing; its replay returned the
    first result forever."""
    with pytest.raises(native.DriverError, match="recorded nothing"):
        native.GraphRun(driver.graph(), (torch.zeros(3),), torch.zeros(3), 0)


@pytest.mark.parametrize(
    ("inputs", "output", "match"),
    [
        ((torch.zeros(3),), torch.zeros(3), "has 2 inputs, not 1"),
        ((torch.zeros(4), torch.zeros(3)), torch.zeros(3), "input 0 has 16 bytes"),
        ((torch.zeros(3).double(), torch.zeros(3)), torch.zeros(3), "input 0 is torch.float64"),
        ((torch.zeros(3, 2)[:, 0], torch.zeros(3)), torch.zeros(3), "not contiguous"),
        ((torch.zeros(3), torch.zeros(3)), torch.zeros(2), "the run writes 12 bytes"),
        ((torch.zeros(3), torch.zeros(3)), torch.zeros(3).int(), "the output is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(driver, inputs, output, match):
    run, _, _ = make(driver)
    with pytest.raises(ValueError, match=match):
        run.launch(inputs, output, 0)
    with pytest.raises(TypeError, match="expected a plain torch.Tensor"):
        run.launch((1, 2), output, 0)


@pytest.mark.parametrize(
    "name", ["cuStreamWaitEvent", "cuMemcpyDtoDAsync_v2", "cuGraphLaunch", "cuEventRecord"]
)
def test_a_refusal_of_the_driver_is_an_error_and_the_run_goes_on(driver, name):
    run, _, _ = make(driver)
    a, b, out = torch.ones(3), torch.ones(3), torch.zeros(3)
    driver.fail(name, 1)
    with pytest.raises(native.DriverError, match=r"invalid argument \(1\)"):
        run.launch((a, b), out, 0)
    driver.fail(name, 0)
    run.launch((a, b), out, 0)
    assert torch.equal(out, torch.full((3,), 3.0)) and driver.depth() == 0


def test_a_failed_instantiation_leaves_nothing(driver):
    before = driver.alive()
    driver.fail("cuGraphInstantiateWithFlags", 2)
    with pytest.raises(native.DriverError, match="out of memory"):
        make(driver)
    assert driver.alive() == before + 1  # the capture is its maker's


@pytest.mark.parametrize(
    "name", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuGraphInstantiateWithFlags", None]
)
def test_a_graph_that_is_taken_over_is_destroyed_whatever_fails(driver, name):
    """Bug: one whose context could not be had, or whose buffers were refused, was left."""
    before = driver.alive()
    graph, buffer = driver.graph(lambda: None), torch.zeros(3)
    if name is None:
        with pytest.raises(ValueError, match="not contiguous"):
            native.GraphRun(graph, (torch.zeros(3, 2)[:, 0],), buffer, 0, take=True)
    else:
        driver.fail(name, 2)
        try:
            with pytest.raises(native.DriverError, match="out of memory"):
                native.GraphRun(graph, (buffer,), buffer, 0, take=True)
        finally:
            driver.fail(name, 0)
    assert driver.alive() == before


def looped(driver: Standin):
    """(run, graphs of its own): 10 times the start, then each row added."""
    x, rows = torch.zeros(3), torch.zeros(8)
    number, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    first = driver.graph(lambda: x.mul_(10))
    body = driver.graph(lambda: x.add_(rows[int(number)]))
    kernel = native.loop_kernel(str(driver.path), 0)
    graph = native.loop_graph(first, body, kernel, number, count, 0)
    return native.GraphRun(graph, (x, rows, count), x, 0, take=True)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_loop_runs_its_step_as_often_as_the_count_says(driver, steps):
    run = looped(driver)
    for _ in range(2):
        out, count = torch.empty(3), torch.tensor([steps], dtype=torch.int32)
        before = driver.calls("cuGraphLaunch")
        run.launch((torch.ones(3), torch.arange(1.0, steps + 1), count), out, 0)
        assert torch.equal(out, torch.full((3,), 10.0 + sum(range(steps + 1))))
        assert driver.calls("cuGraphLaunch") == before + 1


def test_a_loop_without_a_kernel_or_a_driver_for_it(driver):
    with pytest.raises(native.DriverError, match="has no dlms_loop_advance"):
        native.loop_kernel("libc.so.6", 0)
    with pytest.raises(native.DriverError, match="cannot load"):
        native.loop_kernel("/nowhere.so", 0)
    before = driver.alive()
    driver.fail("cuGraphAddNode", 1)
    try:
        with pytest.raises(native.DriverError, match="cuGraphAddNode"):
            looped(driver)
    finally:
        driver.fail("cuGraphAddNode", 0)
    assert driver.alive() == before + 3  # first, body and first's copy in the graph, which is gone


def test_the_ring_on_a_device():
    memory = torch.zeros(3, 2, 4)
    ring = native.DeviceHistoryRing(memory)
    assert (ring.depth, ring.newest, ring.next_slot) == (3, -1, 0)
    with pytest.raises(IndexError, match="holds nothing yet"):
        ring.past(0)
    for n in range(5):
        ring.push(torch.full((2, 4), float(n)))
    assert [ring.past(k)[0, 0].item() for k in range(3)] == [4.0, 3.0, 2.0]
    assert memory[:, 0, 0].tolist() == [3.0, 4.0, 2.0]
    with pytest.raises(IndexError, match="ring of 3 slots"):
        ring.past(3)
    ring.reset()
    assert ring.newest == -1
    with pytest.raises(ValueError, match="depth, B"):
        native.DeviceHistoryRing(torch.zeros(3))


def test_threads_share_a_run(driver):
    """Copies and launch are one step: each thread gets the result of its own inputs."""
    run, _, _ = make(driver)
    wrong: list[int] = []

    def work(number: int) -> None:
        for n in range(200):
            a, out = torch.full((3,), float(number)), torch.empty(3)
            run.launch((a, torch.full((3,), float(n))), out, 0)
            if not torch.equal(out, torch.full((3,), 2.0 * number + n)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and run.launches == 800


def test_without_a_driver_the_reason_is_told():
    native.use_cuda_driver("")
    if not native.cuda_driver_problem():
        pytest.skip("this machine has a driver")
    assert "libcuda" in native.cuda_driver_problem()
    with pytest.raises(native.DriverError, match="no CUDA driver"):
        native.GraphRun(1, (torch.zeros(3),), torch.zeros(3), 0)

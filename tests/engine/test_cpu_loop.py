"""The compiled loop does what the rows say, allocates nothing and survives what is thrown at it."""

import threading

import pytest
import torch

from dlms_engine import ops
from dlms_engine.engine import cpu_loop
from dlms_engine.ops import layout, reference

pytestmark = pytest.mark.skipif(
    not cpu_loop.loop_available(), reason="built without dlms_engine._C"
)

SHAPE = (3, 2, 5, 7)


def table(rows=6, depth=3, per_sample=False, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    batch = (SHAPE[0],) if per_sample else ()
    columns = [0.5 * torch.randn(*batch, rows, generator=g, dtype=torch.float64) for _ in range(4)]
    b = 0.5 * torch.randn(*batch, rows, depth, generator=g, dtype=torch.float64)
    for n in range(min(rows, depth - 1)):
        b[..., n, n + 1 :] = 0.0  # nothing was written there yet
    packed = layout.pack_rows(*columns, 2.5, b, dtype=dtype)
    return packed.transpose(0, 1).contiguous() if per_sample else packed


def network(n, x):
    return (torch.sin(x.float() + n)).to(x.dtype)


def pair(n, x):
    return network(n, x), network(n + 1, x)


def reference_loop(x0, rows, network, c_in=1.0, network_dtype=torch.float32):
    x, ring = x0.clone(), torch.full((rows.shape[-1] - layout.B, *x0.shape), float("nan"))
    ring = ring.to(x0.dtype)
    network_input = (torch.as_tensor(c_in, dtype=x0.dtype).reshape(-1, 1, 1, 1) * x).to(
        network_dtype
    )
    states = []
    for n, row in enumerate(rows):
        f = network(n, network_input)
        f, f_cond = f if isinstance(f, tuple) else (f, None)
        reference.fused_row_(f, f_cond, x, ring, row, network_input)
        states.append(x.clone())
    return states


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize("net", [network, pair], ids=["one", "pair"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=lambda d: f"{d[1]}"[6:],
)
def test_loop_has_the_bits_of_eager_rows(per_sample, net, dtypes):
    rows = table(per_sample=per_sample, dtype=dtypes[0])
    x0 = torch.randn(SHAPE, dtype=dtypes[0])
    c_in = torch.tensor([0.3, 0.7, 1.1], dtype=dtypes[0]) if per_sample else 0.4
    run = cpu_loop.Engine(SHAPE, 3, state_dtype=dtypes[0], network_dtype=dtypes[1])
    expected = reference_loop(x0, rows, net, c_in, dtypes[1])
    states = []
    for _ in range(2):  # the second run must not see the first one's history
        states.clear()
        out = run.run(x0, rows, net, c_in=c_in, callback=lambda n, x: states.append(x.clone()))
        assert len(states) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
        assert torch.equal(out, expected[-1])


@pytest.mark.parametrize("depth", range(1, 21))
def test_every_depth(depth):
    rows, x0 = table(rows=depth + 2, depth=depth), torch.randn(SHAPE)
    out = cpu_loop.Engine(SHAPE, depth).run(x0, rows, network)
    assert torch.equal(out, reference_loop(x0, rows, network)[-1])


def test_rows_asked_for_while_sampling():
    rows = table(per_sample=True)
    x0, order = torch.randn(SHAPE), []

    def asked(n):
        order.append(("row", n))
        return rows[n].clone()  # nobody else keeps it alive

    def counting(n, x):
        order.append(("network", n))
        return network(n, x)

    out = cpu_loop.Engine(SHAPE, 3).run(x0, len(rows), counting, row_fn=asked)
    assert torch.equal(out, reference_loop(x0, rows, network)[-1])
    assert order == [(what, n) for n in range(len(rows)) for what in ("network", "row")]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1,), (300_001,), (2, 70_001)], ids=str)
def test_sizes(shape):
    rows = table(per_sample=False)
    x0 = torch.randn(shape)
    out = cpu_loop.Engine(shape, 3).run(x0, rows, lambda n, x: 0.5 * x)
    x, ring, network_input = x0.clone(), torch.zeros(3, *shape), x0.clone()
    for row in rows:
        reference.fused_row_(0.5 * network_input, None, x, ring, row, network_input)
    assert torch.equal(out, x)


def test_nothing_is_allocated_or_moved_after_construction():
    run = cpu_loop.Engine(SHAPE, 3)
    rows, x0, f = table(), torch.randn(SHAPE), torch.randn(SHAPE)
    out, c_in = torch.empty_like(x0), torch.tensor(1.0)
    seen = set()

    def net(n, x):
        seen.add((x.data_ptr(), run.loop.state.data_ptr(), run.loop.ring.tensor.data_ptr()))
        return f

    run.run(x0, rows, net, c_in=c_in, out=out)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run.loop.run(x0, c_in, rows, net)
    assert len(seen) == 1
    assert sum(abs(e.self_cpu_memory_usage) for e in profile.key_averages()) == 0
    # the control: this does allocate
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run.loop.run(x0, c_in, rows, lambda n, x: f.clone())
    assert sum(e.self_cpu_memory_usage != 0 for e in profile.key_averages()) > 0


@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
def test_only_what_a_later_row_reads_is_stored(per_sample):
    """Row 3 weighs the m of row 1, nobody any other: three of four stay unwritten."""
    rows = table(rows=4, depth=4, per_sample=per_sample)
    rows[..., layout.B + 1 :] = 0.0
    rows[3, ..., layout.B + 2] = 0.5  # of one sample is enough, too
    if per_sample:
        rows[3, 1:, layout.B + 2] = 0.0
    run, x0 = cpu_loop.Engine(SHAPE, 4), torch.randn(SHAPE)
    run.loop.ring.tensor.fill_(float("nan"))
    out = run.run(x0, rows, network)
    written = [slot.isfinite().all().item() for slot in run.loop.ring.tensor]
    assert written == [False, True, False, False]
    assert torch.equal(out, reference_loop(x0, rows, network)[-1])
    # Rows that are asked for one by one could weigh anything: all but the last are kept.
    out = run.run(x0, len(rows), network, row_fn=lambda n: rows[n])
    written = [slot.isfinite().all().item() for slot in run.loop.ring.tensor]
    assert written == [True, True, True, False]
    assert torch.equal(out, reference_loop(x0, rows, network)[-1])


WRONG_OUTPUTS = [
    (lambda x: x.double(), ValueError, r"output is torch.float64 \[3, 2, 5, 7\] on cpu, expected "),
    (
        lambda x: x[:2],
        ValueError,
        r"float32 \[2, 2, 5, 7\] on cpu, expected contiguous torch.float32",
    ),
    (lambda x: x.mT.contiguous().mT, ValueError, "and not contiguous, expected contiguous"),
    (lambda x: x.to("meta"), Exception, "meta|DLPack|device"),
    (lambda x: (x, x, x), ValueError, r"tuple of 3, expected F or \(F_unconditional"),
    (lambda x: (x, x.half()), ValueError, "conditional output is torch.float16"),
    (lambda x: x.numpy(), TypeError, "ndarray, expected a torch.Tensor"),
    (lambda x: None, TypeError, "NoneType, expected a torch.Tensor"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), WRONG_OUTPUTS)
def test_wrong_outputs_are_named_and_leave_the_loop_usable(spoil, error, message):
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    with pytest.raises(error, match=message):
        run.run(x0, rows, lambda n, x: spoil(x) if n == 2 else network(n, x))
    assert torch.equal(run.run(x0, rows, network), reference_loop(x0, rows, network)[-1])


def test_exceptions_pass_through():
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)

    def fail(n, *_):
        if n == 1:
            raise KeyError("from inside")
        return network(n, x0)

    for options in (
        {"network": fail},
        {"network": network, "callback": fail},
        {"network": network, "row_fn": lambda n: fail(n) and rows[n], "rows": 6},
    ):
        with pytest.raises((KeyError, RuntimeError), match="from inside|Boolean value"):
            run.run(x0, **{"rows": rows, **options})
    assert torch.equal(run.run(x0, rows, network), reference_loop(x0, rows, network)[-1])


def test_wrong_arguments_are_named():
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"x is torch.float64 .*expected contiguous torch.float32"):
        run.run(x0.double(), rows, network)
    with pytest.raises(ValueError, match=r"rows is torch.float32 \[6, 8\].*\[rows, 9\] or"):
        run.run(x0, rows[:, :8].contiguous(), network)
    with pytest.raises(ValueError, match=r"c_in is .*expected contiguous torch.float32 \[3\]"):
        run.run(x0, rows, network, c_in=torch.ones(2))
    with pytest.raises(TypeError, match="rows is the number of rows"):
        run.run(x0, rows, network, row_fn=lambda n: rows[n])
    bad = rows.clone()
    bad[3, layout.SLOT] = 3
    with pytest.raises(ValueError, match=r"slot column of row 0 is not one of 0 \.\. 2"):
        run.run(x0, bad, network)
    for arguments, message in [
        (((), 1), r"shape is \[\]"),
        ((SHAPE, 0), "depth is 0, expected 1 to 4096"),
        (((2, -1), 1), r"shape is \[2, -1\]"),
        (((2**40, 2**40), 1), r"shape is \[1099511627776, 1099511627776\], too large"),
        (((2**52, 1), 4096), r"shape is \[4096, 4503599627370496, 1\], too large"),
    ]:
        with pytest.raises(ValueError, match=message):
            cpu_loop.Engine(*arguments)
    with pytest.raises(ValueError, match="network float64: expected a float32 state"):
        cpu_loop.Engine(SHAPE, 1, network_dtype=torch.float64)
    with pytest.raises(ValueError, match="network_dtype is torch.int64"):
        cpu_loop.Engine(SHAPE, 1, network_dtype=torch.int64)


def test_gradients_are_off_inside_and_refused_outside():
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    weight = torch.ones((), requires_grad=True)
    out = run.run(x0, rows, lambda n, x: weight * network(n, x))
    assert torch.equal(out, reference_loop(x0, rows, network)[-1]) and not out.requires_grad
    with pytest.raises(ValueError, match="x0 requires grad"):
        run.run(x0.requires_grad_(), rows, network)


def test_a_running_loop_refuses_to_start_again():
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)

    def nested(n, x):
        return run.run(x0, rows, network)

    with pytest.raises(RuntimeError, match="running already"):
        run.run(x0, rows, nested)
    assert torch.equal(run.run(x0, rows, network), reference_loop(x0, rows, network)[-1])


def test_loops_of_two_threads_do_not_meet():
    shape, rows = (2, 40_000), table()
    starts = [torch.randn(shape) for _ in range(2)]

    def sample(x0):
        return cpu_loop.Engine(shape, 3).run(x0, rows, lambda n, x: torch.sin(x))

    expected, got = [sample(x) for x in starts], [None, None]

    def work(i):
        for _ in range(5):
            got[i] = sample(starts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_history_ring():
    ring = cpu_loop._native.HistoryRing(3, [2, 4], torch.float32)
    with pytest.raises(IndexError, match="holds nothing yet"):
        ring.past(0)
    address = ring.tensor.data_ptr()
    for value in range(5):
        ring.push(torch.full((2, 4), float(value)))
    assert [ring.past(k)[0, 0].item() for k in range(3)] == [4.0, 3.0, 2.0]
    assert (ring.newest, ring.next_slot, ring.tensor.data_ptr()) == (1, 2, address)
    with pytest.raises(IndexError, match="of a ring of 3 slots"):
        ring.past(3)
    ring.reset()
    assert ring.newest == -1


def test_step_by_step_equals_run():
    run, rows, x0 = cpu_loop.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    run.loop.start(x0, torch.tensor(1.0))
    for n, row in enumerate(rows):
        f = network(n, run.loop.network_input)
        run.loop.step(f, None, row)
        assert torch.equal(run.loop.ring.past(0), run.loop.ring.tensor[n % 3])
    assert torch.equal(run.loop.state, reference_loop(x0, rows, network)[-1])


def test_missing_loop_is_an_unavailable_backend(monkeypatch):
    monkeypatch.setattr(cpu_loop, "_native", None)
    monkeypatch.setattr(cpu_loop, "_problem", "no module named _C")
    with pytest.raises(ops.BackendUnavailable, match="no module named _C.*backend='eager'"):
        cpu_loop.Engine(SHAPE, 1)

"""Python code that a run calls (network, row function, callback) may do anything to the tensors it
gets: the run goes on with the right numbers or ends in an error, never in memory that is gone, and
the next run is unharmed. `-m slow` repeats all of it under the address sanitizer."""

import random
import sys
from pathlib import Path

import pytest
import torch

from dlms_engine.engine import cpu_loop as engine
from dlms_engine.ops import layout, reference

sys.path.insert(0, str(Path(__file__).parent))

from test_cpu_loop import SHAPE, network, reference_loop, table

pytestmark = pytest.mark.skipif(not engine.loop_available(), reason="built without dlms_engine._C")

ERRORS = (ValueError, RuntimeError, TypeError, IndexError)


def shrink(x):
    x.untyped_storage().resize_(0)


def point_elsewhere(x):
    x.set_(torch.zeros(2, 2))


def other_data(x):
    x.data = torch.zeros(7)


def swapped(x):
    torch.utils.swap_tensors(x, torch.zeros(x.shape, dtype=x.dtype))  # the same form: new values


HOSTILE = {
    "shrink the storage": shrink,
    "grow": lambda x: x.resize_(10_000),
    "shrink": lambda x: x.resize_(1),
    "squeeze": lambda x: x.unsqueeze_(0),
    "transpose": lambda x: x.transpose_(0, 1),
    "transpose the square part": lambda x: x.transpose_(-1, -2),
    "set": point_elsewhere,
    "empty set": lambda x: x.set_(),
    "data": other_data,
    "as_strided": lambda x: x.as_strided_((1,), (1,)),
    "swap": swapped,
    "half": lambda x: setattr(x, "data", x.half()),
}
CHANGES_NOTHING = {
    "requires_grad": lambda x: x.requires_grad_(),
    "view": lambda x: x.view(-1)[3:].add(1),
}


def run_safely(run, x0, rows, net, **options):
    """The end state, or the error; anything else ends the test."""
    try:
        return run.run(x0, rows, net, **options)
    except ERRORS as error:
        return error


def still_right(run, x0, rows):
    expected = reference_loop(x0, rows, network)[-1]
    states = []
    out = run.run(x0, rows, network, callback=lambda n, x: states.append(x.clone()))
    assert torch.equal(out, expected) and torch.equal(states[-1], expected)
    assert tuple(run.loop.state.shape) == tuple(run.loop.network_input.shape) == SHAPE
    assert tuple(run.loop.ring.tensor.shape) == (3, *SHAPE)


@pytest.mark.parametrize("harm", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("who", ["network", "callback"])
def test_a_live_tensor_changed_in_place_is_an_error_and_is_forgotten(who, harm):
    run, rows, x0 = engine.Engine(SHAPE, 3), table(), torch.randn(SHAPE)

    def net(n, x):
        f = network(n, x)
        if who == "network" and n == 1:
            harm(x)
        return f

    def callback(n, x):
        if who == "callback" and n == 1:
            harm(x)

    with pytest.raises(ERRORS, match="in place, it is now|not resizable|swap"):
        run.run(x0, rows, net, callback=callback)
    still_right(run, x0, rows)


@pytest.mark.parametrize("harm", [*HOSTILE.values(), *CHANGES_NOTHING.values()])
@pytest.mark.parametrize("what", ["rows", "x0", "ring", "state", "input"])
def test_the_other_tensors_of_a_run_are_copied_or_cannot_be_moved(what, harm):
    """The callback reaches what it was not handed: the caller's rows and start, the loop's own."""
    run, rows, x0 = engine.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    expected = reference_loop(x0, rows, network)[-1]
    kept_rows, kept_x0 = rows.clone(), x0.clone()

    def callback(n, x):
        if n == 1:
            with torch.enable_grad():
                harm({"rows": rows, "x0": x0, "ring": run.loop.ring.tensor,
                      "state": run.loop.state, "input": run.loop.network_input}[what])  # fmt: skip

    out = run_safely(run, x0, rows, network, callback=callback)
    assert isinstance(out, ERRORS) or torch.equal(out, expected)
    still_right(run, kept_x0, kept_rows)


@pytest.mark.parametrize("harm", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("which", [0, 1, "row"])
def test_a_row_function_may_spoil_the_outputs_or_the_row_before(which, harm):
    run, rows, x0 = engine.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    pair, given = [], []

    def net(n, x):
        pair[:] = network(n, x), network(n + 1, x)
        return tuple(pair)

    def row_fn(n):
        if n == 2:
            harm(given[-1] if which == "row" else pair[which])
        given.append(rows[n].clone())
        return given[-1]

    out = run_safely(run, x0, len(rows), net, row_fn=row_fn)
    usual = run.run(x0, len(rows), lambda n, x: (network(n, x), network(n + 1, x)),
                    row_fn=lambda n: rows[n])  # fmt: skip
    new_values = harm is swapped and which != "row"
    assert isinstance(out, ERRORS) or torch.equal(out, usual) != new_values
    still_right(run, x0, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_sample", [False, True], ids=["static", "per_sample"])
@pytest.mark.parametrize("asked", [False, True], ids=["table", "row_fn"])
def test_what_a_callback_writes_into_the_state_counts_from_the_next_evaluation(
    dtype, per_sample, asked
):
    """The input of the next evaluation used to be formed before the callback: a change of the state
    was half honoured."""
    run = engine.Engine(SHAPE, 3, network_dtype=dtype)
    rows, x0 = table(per_sample=per_sample), torch.randn(SHAPE)

    def by_numpy(n, x):  # torch does not see it
        if n == 2:
            x.numpy()[...] *= 0.5

    def row_fn(n):
        return rows[n].clone()

    out = run.run(x0, len(rows) if asked else rows, network, callback=by_numpy,
                  row_fn=row_fn if asked else None)  # fmt: skip
    first = reference_loop(x0, rows[:3], network, network_dtype=dtype)[-1] * 0.5
    # From there by hand: the same ring, the changed state, an input formed from it.
    x, ring = x0.clone(), torch.zeros(3, *SHAPE)
    scale = torch.ones(SHAPE[0])
    for n, row in enumerate(rows):
        network_input = (scale.reshape(-1, 1, 1, 1) * x).to(dtype)
        reference.fused_row_(network(n, network_input), None, x, ring, row, network_input)
        if n == 2:
            x.mul_(0.5)
            assert torch.equal(x, first)
        scale = row[..., layout.C_IN].expand(SHAPE[0])
    assert torch.equal(out, x)


def test_random_harm_in_random_places():
    """Fixed seeds, so that a failure can be repeated."""
    rng = random.Random(0)
    acts = [*HOSTILE.values(), *CHANGES_NOTHING.values()]
    run, rows, x0 = engine.Engine(SHAPE, 3), table(), torch.randn(SHAPE)
    ended = 0
    for _ in range(300):
        kept = []

        def maybe(*tensors, kept=kept):
            kept.extend(t for t in tensors if isinstance(t, torch.Tensor))
            if kept and rng.random() < 0.15:
                rng.choice(acts)(rng.choice(kept))

        def net(n, x, maybe=maybe):
            f = network(n, x)
            maybe(x, f)
            return f

        def row_fn(n, maybe=maybe):
            row = rows[n].clone()
            maybe(row)
            return row

        out = run_safely(run, x0, len(rows), net, row_fn=row_fn, callback=lambda n, x: maybe(x))
        ended += isinstance(out, ERRORS)
        still_right(run, x0, rows)
    assert 0 < ended < 300  # some runs were harmed, some were not

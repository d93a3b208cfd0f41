"""The trace's algebra: presence, elimination, conversions, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dlms_engine.processes import EDM, RectifiedFlow
from dlms_engine.solvers.trace import Form, Trace

GRID = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def apply(form: Form, states: list[float], outputs: list[float]) -> float:
    total = sum(float(w) * states[k] for k, w in form.states.items())
    return total + sum(float(w) * outputs[k] for k, w in form.outputs.items())


def test_forms_are_linear() -> None:
    one = torch.ones((), dtype=torch.float64)
    x, m = Form({0: one}, {}), Form({}, {0: one})
    mixed = 2.0 * (x + m * torch.tensor(3.0)) - x / 4 + (-m)
    assert apply(mixed, [5.0], [7.0]) == 2 * (5 + 21) - 5 / 4 - 7


def test_multiplying_by_a_python_zero_removes_the_term() -> None:
    one = torch.ones((), dtype=torch.float64)
    gone = Form({0: one}, {1: one}) * 0
    assert not gone.states and not gone.outputs
    kept = Form({0: one}, {}) * torch.zeros(())
    assert set(kept.states) == {0}


def test_a_two_stage_step_is_eliminated_through_its_middle() -> None:
    """x' = x0 + h (d0 + d1) / 2 with y = x0 + h d0 is x' = y - h d0 / 2 + h d1 / 2."""
    trace = Trace(EDM(), "noise")
    first = trace.evaluate(trace.start(), 4.0)
    second = trace.evaluate(first.x + first.noise * -2.0, 2.0)
    final = first.x + (first.noise + second.noise) * -1.0
    table = trace.table(final, GRID[:2], name="heun")
    assert table.nfe == 2 and table.depth == 2
    assert table.a.tolist() == [1, 1]
    assert table.b.tolist() == [[-2, 0], [-1, 1]]


def test_older_states_in_data_form_bring_every_older_output_in() -> None:
    trace, x = Trace(EDM(), "data"), None
    older = []
    for t, t_next in pairwise(GRID):
        out = trace.evaluate(trace.start() if x is None else x, t)
        older.append(out.noise)
        x = out.x + (older[-1] * 1.5 - older[max(len(older) - 2, 0)] * 0.5) * (t_next - t)
    assert x is not None
    assert trace.table(x, GRID, name="ab2").depth == 3


def test_unused_history_has_weight_exactly_zero() -> None:
    trace, x = Trace(EDM(), "noise"), None
    older = []
    for t, t_next in pairwise(GRID):
        out = trace.evaluate(trace.start() if x is None else x, t)
        older.append(out.noise)
        x = out.x + (older[-1] * 1.5 - older[max(len(older) - 2, 0)] * 0.5) * (t_next - t)
    assert x is not None
    table = trace.table(x, GRID, name="ab2")
    assert table.depth == 2 and table.b[0, 1].item() == 0


def test_conversion_happens_at_the_network_time() -> None:
    trace = Trace(EDM(), "data")
    out = trace.evaluate(trace.start(), 4.0, 5.0)
    noise = out.noise
    assert float(noise.states[0]) == 1 / 5 and float(noise.outputs[0]) == -1 / 5
    trace = Trace(RectifiedFlow(), "noise")
    data = trace.evaluate(trace.start(), 0.5, 0.6).data
    assert float(data.states[0]) == pytest.approx(1 / 0.4)
    assert float(data.outputs[0]) == pytest.approx(-0.6 / 0.4)


def test_analytical_first_step() -> None:
    process = EDM()
    trace = Trace(process, "data")
    first = trace.analytic(trace.start(), GRID[0], "dockhorn")
    norm = (1 + 16.0) ** 0.5
    assert float(first.noise.states[-1]) == pytest.approx(1 / norm)
    assert float(first.data.states[-1]) == pytest.approx(1 - 4 / norm)
    # data and noise describe one state: x = alpha data + sigma noise
    both = first.data + first.noise * 4.0
    assert float(both.states[-1]) == pytest.approx(1.0, abs=1e-15)
    zero = trace.analytic(trace.start(), GRID[0], "zero")
    assert not zero.data.states and float(zero.noise.states[-1]) == 0.25


def test_initial_scale_and_the_start_state_after_it() -> None:
    trace = Trace(EDM(), "noise")
    start = trace.start()
    out = trace.evaluate(start * 0.5, 2.0)
    table = trace.table(out.x + start, GRID[:2], name="late")
    assert table.initial_scale.item() == 0.5
    assert table.a.tolist() == [3.0]  # start = x_0 / 0.5


def test_coefficients_carry_gradients() -> None:
    t = GRID[:2].clone().requires_grad_()
    trace = Trace(EDM(), "data")
    out = trace.evaluate(trace.start(), t[0])
    table = trace.table(out.x * (t[1] / t[0]) + out.data * (1 - t[1] / t[0]), t, name="ddim")
    (grad,) = torch.autograd.grad(table.b.sum() + table.a.sum() * 2, t)
    assert grad.tolist() == pytest.approx([-0.125, 0.25])


def test_errors() -> None:
    with pytest.raises(ValueError, match="'both'"):
        Trace(EDM(), "both")  # type: ignore[arg-type]
    trace = Trace(EDM())
    with pytest.raises(ValueError, match="no network evaluation"):
        trace.table(trace.start(), GRID[:2], name="empty")
    with pytest.raises(ValueError, match="afs is 'guess'"):
        trace.analytic(trace.start(), 4.0, "guess")
    out = trace.evaluate(trace.start(), 4.0)
    other = Trace(EDM())
    with pytest.raises(ValueError, match="multiple of start"):
        other.evaluate(out.x, 4.0)


def test_a_state_that_forgot_the_start_cannot_be_undone() -> None:
    trace = Trace(EDM(), "data")
    start = trace.start()
    first = trace.evaluate(start, 4.0)
    second = trace.evaluate(first.data, 2.0)
    with pytest.raises(ValueError, match="state 0 is needed"):
        trace.table(start + second.data, GRID[:2], name="lost")


def test_predictions_that_are_not_determined() -> None:
    trace = Trace(RectifiedFlow(), "noise")
    out = trace.evaluate(trace.start(), 1.0)
    with pytest.raises(ValueError, match="alpha is 0"):
        _ = out.data
    trace = Trace(RectifiedFlow(), "data")
    out = trace.evaluate(trace.start(), 0.0)
    with pytest.raises(ValueError, match="sigma is 0"):
        _ = out.noise

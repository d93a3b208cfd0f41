"""What the operators promise torch: schema, fake kernels, gradients, compile; and their errors."""

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from dlms_engine import ops
from dlms_engine.ops import backends, layout, reference, schema

OPS = torch.ops.dlms


def make_case(depth, per_sample, guided, dtype=torch.float64, network=None, shape=(2, 3)):
    g = torch.Generator().manual_seed(depth)
    f, f_cond, x = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(3))
    ring = torch.randn((depth, *shape), generator=g, dtype=dtype)
    width = layout.row_width(depth)
    size = (shape[0], width) if per_sample else (width,)
    row = torch.randn(size, generator=g, dtype=dtype)
    row[..., layout.SLOT] = depth - 1
    network = network or dtype
    return f.to(network), f_cond.to(network) if guided else None, x, ring, row


VARIANTS = list(itertools.product([1, 2, 3, 4, 5], [False, True], [False, True]))
IDS = [f"depth{d}-{'rows' if p else 'row'}-{'pair' if g else 'one'}" for d, p, g in VARIANTS]


def row_gradcheck(function, case):
    """gradcheck of everything but the slot column, which is a number of a slot."""
    f, f_cond, x, ring, row = case
    inputs = [None if t is None else t.clone().requires_grad_() for t in (f, f_cond, x, ring)]
    slot = row[..., layout.SLOT : layout.SLOT + 1]
    rest = torch.cat([row[..., : layout.SLOT], row[..., layout.B :]], -1).requires_grad_()

    def call(f, f_cond, x, ring, rest):
        return function(f, f_cond, x, ring, torch.cat([rest[..., :5], slot, rest[..., 5:]], -1))

    return torch.autograd.gradcheck(call, (*inputs, rest))


def native_columns(text):
    """The columns of csrc/columns.h, under their names in ``layout``."""
    return {name: int(number) for name, number in re.findall(r"k(\w+) = (\d+)", text)}


def test_native_sources_have_the_columns_of_the_layout():
    text = (Path(__file__).parents[2] / "csrc" / "columns.h").read_text()
    names = {"CSkip": "C_SKIP", "COut": "C_OUT", "A": "A", "CIn": "C_IN"}
    names |= {"Guidance": "GUIDANCE", "Slot": "SLOT", "B": "B"}
    want = {name: getattr(layout, column) for name, column in names.items()}
    assert native_columns(text) == want
    assert native_columns(text.replace("kCIn = 3", "kCIn = 2")) != want


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_gradients(variant):
    case = make_case(*variant)
    assert row_gradcheck(ops.fused_row, case)


@pytest.mark.parametrize("variant", VARIANTS[4:8], ids=IDS[4:8])
def test_gradients_at_zero_weights(variant):
    """A weight that starts at zero must be able to leave it."""
    case = make_case(*variant)
    case[-1][..., layout.B :] = 0.0
    assert row_gradcheck(ops.fused_row, case)


def test_the_gradient_check_can_fail():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    case = make_case(2, False, False)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        row_gradcheck(lambda f, c, x, h, r: ops.fused_row(f, c, Wrong.apply(x), h, r), case)


def test_gradient_of_an_unwritten_slot_is_finite():
    f, _, x, ring, row = make_case(3, True, False)
    ring.fill_(float("nan"))
    row[..., layout.B + 1 :] = 0.0
    row.requires_grad_()
    for backend in ops.available("cpu"):
        *_, grad_row = ops.select(backend).fused_row_backward(x, x, f, f, None, x, ring, row)
        assert grad_row.isfinite().all() and not grad_row[..., layout.B + 1 :].any()


def test_second_derivatives_are_refused():
    f, _, x, ring, row = make_case(1, False, False)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.fused_row(f, None, x, ring, row)[0].sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS[:12], ids=IDS[:12])
@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(variant, network):
    f, f_cond, x, ring, row = make_case(*variant, dtype=torch.float32, network=network)
    grads = (torch.randn_like(x), torch.randn_like(x), torch.randn_like(f))
    torch.library.opcheck(OPS.fused_row_backward.default, (*grads, f, f_cond, x, ring, row))
    torch.library.opcheck(OPS.fused_row_.default, (f, f_cond, x, ring, row, torch.empty_like(f)))
    inputs = [None if t is None else t.requires_grad_() for t in (f, f_cond, x, ring, row)]
    torch.library.opcheck(OPS.fused_row.default, tuple(inputs))


def test_compiles_whole_and_once():
    """Other numbers in the row, another slot: no graph break, no second compilation."""

    def two_rows(f, x, ring, rows, network_input):
        x = x.clone()
        ops.fused_row_(f, None, x, ring, rows[0], network_input)
        ops.fused_row_(network_input, None, x, ring, rows[1], network_input)
        return ops.fused_row(f, None, x, ring, rows[1])

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_rows, fullgraph=True, backend=counter)
    for seed in range(3):
        f, _, x, ring, row = make_case(2, False, False, torch.float32, shape=(2, 8))
        rows = torch.stack([row, row * 0.5 * (seed + 1)])
        rows[:, layout.SLOT] = torch.tensor([seed % 2, (seed + 1) % 2])
        rings = ring.clone(), ring.clone()
        want = two_rows(f, x, rings[0], rows, torch.empty_like(f))
        got = compiled(f, x, rings[1], rows, torch.empty_like(f))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(*rings)
    assert counter.frame_count == 1


def test_layouts_that_are_not_contiguous():
    case = make_case(3, True, True, torch.float32, torch.bfloat16, shape=(4, 6))
    f, f_cond, x, ring, row = case
    strided = (f.t().contiguous().t(), f_cond, x.t().contiguous().t(), ring.mT.contiguous().mT, row)
    assert not strided[0].is_contiguous()
    for got, want in zip(ops.fused_row(*strided), reference.fused_row(*case), strict=True):
        assert torch.equal(got, want)
    if "cpu" in ops.available():
        with pytest.raises(RuntimeError, match="x is written in place and must be contiguous"):
            ops.fused_row_(f, f_cond, strided[2], ring, row, torch.empty_like(f))


def spoiled(case, **changes):
    names = ("f", "f_cond", "x", "ring", "row")
    return tuple(changes.get(name, t) for name, t in zip(names, case, strict=True))


@pytest.mark.parametrize("name", ops.available("cpu"))
def test_errors_name_what_was_given_and_what_was_expected(name):
    run = ops.select(name).fused_row
    case = make_case(2, False, True, torch.float32)
    wrong = [
        ({"f": torch.zeros(2, 4)}, r"f is [\[(]2, 4[\])].*2, 3"),
        ({"f_cond": torch.zeros(3, 3)}, r"f_cond is .*3, 3.*expected .*2, 3"),
        ({"ring": torch.zeros(2, 3, 3)}, r"ring is [\[(]2, 3, 3[\])]"),
        ({"row": torch.zeros(7)}, r"row is [\[(]7,?[\])], expected \[8\] or \[2, 8\]"),
        ({"row": torch.zeros(3, 8)}, r"row is [\[(]3, 8[\])]"),
        (
            {"row": torch.zeros(8, dtype=torch.float64)},
            "ring.*row.*dtype|ring is .*row is .*float64",
        ),
        ({"f": torch.zeros(2, 3, dtype=torch.float64), "f_cond": None}, "float64"),
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "x "),
    ]
    for changes, message in wrong:
        with pytest.raises((ValueError, RuntimeError), match=message):
            run(*spoiled(case, **changes))


@pytest.mark.skipif("cpu" not in ops.available(), reason="built without _ops_cpu")
@pytest.mark.parametrize("slot", [-1.0, 2.0, float("nan"), 1e30])
def test_a_bad_slot_is_refused_before_memory_is_touched(slot):
    case = make_case(2, True, False, torch.float32)
    case[-1][1, layout.SLOT] = slot
    with pytest.raises(RuntimeError, match=r"slot column of row 1 is not one of 0 \.\. 1"):
        ops.fused_row(*case)


def test_choice_of_backend(monkeypatch, caplog):
    assert ops.select("eager", "cpu").name == "eager"
    assert ops.available()[-1] == "eager" or "triton" in ops.available()
    with pytest.raises(ValueError, match="'gpu', expected one of auto, eager, cpu, cuda, triton"):
        ops.select("gpu")
    if "cuda" not in ops.available():
        with pytest.raises(ops.BackendUnavailable, match="backend 'cuda'.*backend='auto'"):
            ops.select("cuda")
    monkeypatch.setattr(backends, "_backends", {"eager": ops.select("eager")})
    monkeypatch.setattr(backends, "_best_first", [ops.select("eager")])
    monkeypatch.setattr(backends, "_warned", set())
    with caplog.at_level(logging.INFO, logger="dlms_engine"):
        assert ops.select("auto").name == "eager"
        ops.select("auto")
    assert [r.message.startswith("no compiled backend for cpu") for r in caplog.records] == [True]
    assert caplog.records[0].levelno == logging.WARNING and "dlms doctor" in caplog.text
    with pytest.raises(ops.BackendUnavailable):
        ops.select("cpu")


def test_registering_unknown_names_is_refused():
    with pytest.raises(ValueError, match="no operator dlms::fused_column"):
        schema.register_kernels("CPU", {"fused_column": lambda: None})


def test_pack_rows_and_pack_row_agree():
    rows, depth, batch = 5, 3, 2
    columns = [torch.randn(batch, rows, dtype=torch.float64) for _ in range(4)]
    b = torch.randn(batch, rows, depth, dtype=torch.float64)
    packed = layout.pack_rows(*columns, 1.5, b, dtype=torch.float32)
    assert packed.shape == (batch, rows, layout.row_width(depth)) and packed.dtype == torch.float32
    assert packed[0, :, layout.SLOT].tolist() == [0, 1, 2, 0, 1]
    for n in range(rows):
        one = layout.pack_row(*(c[:, n] for c in columns), 1.5, n % depth, b[:, n])
        assert torch.equal(one.float(), packed[:, n])
    assert torch.equal(packed[..., layout.A], columns[2].float())
    with pytest.raises(ValueError, match=r"c_skip is \(4,\), expected \[\.\.\., 5\]"):
        layout.pack_rows(torch.zeros(4), *columns[1:], 1.0, b)
    with pytest.raises(ValueError, match="slot is 3"):
        layout.pack_row(*(c[0, 0] for c in columns), 1.0, 3, b[0, 0])

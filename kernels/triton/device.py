"""Triton kernels of the fused row; the order of operations is that of `ops/reference.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from dlms_engine.kernels.triton.columns import C_IN, C_OUT, C_SKIP, GUIDANCE, SLOT, A, B
from triton import knobs

if knobs.runtime.interpret:

    @triton.jit
    def mul(a, b):  # type: ignore[no-untyped-def]
        """A * b; the interpreter computes with NumPy, which does not contract."""
        return a * b

    @triton.jit  # type: ignore[untyped-decorator]
    def to_network(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """V in the network's dtype, to nearest even.

        The interpreter cuts a float32 off to bfloat16 (and its own "rtne" loses the carry into the
        exponent), so the rounding is done on the bits first.
        """
        if dtype == tl.bfloat16:
            bits = v.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
        return v.to(dtype)

else:

    @triton.jit
    def mul(a, b):  # type: ignore[no-untyped-def]
        """A * b, rounded before it is added to anything, denormal numbers kept.

        A plain product would become half of a fused multiply-add, and libdevice's mul_rn flushes
        denormals to zero: both have other bits than the eager reference. (The launch options
        enable_fp_fusion and enable_reflect_ftz say the same for a whole kernel, but torch.compile
        does not pass them on.)
        """
        if b.dtype == tl.float64:
            product = tl.inline_asm_elementwise(
                "mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, is_pure=True, pack=1
            )
        else:
            product = tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1
            )
        return product

    @triton.jit  # type: ignore[untyped-decorator]
    def to_network(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """V in the network's dtype, to nearest even as hardware does."""
        return v.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def ring_slot(number, depth: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row's slot modulo the depth: inside the ring whatever the row holds."""
    slot = number.to(tl.int32) % depth
    return (slot + depth) % depth


@triton.jit  # type: ignore[untyped-decorator]
def mixed_branches(f, f_cond, guidance, guided: tl.constexpr):  # type: ignore[no-untyped-def]
    """F + guidance * (f_cond - f), or f."""
    if guided:
        return f + mul(guidance, f_cond - f)
    return f


GROUP: tl.constexpr = tl.constexpr(4)
"""Slots of the ring that are loaded before the first of them is used."""

FORWARD = {4: {"num_warps": 4, "maxnreg": 64}, 8: {"num_warps": 4, "maxnreg": 128}}
"""How the forward kernel is compiled, by the bytes of a number of the state. With a bound on its
registers the assembler uses them; without one it saves them and moves each load to its first use."""
BACKWARD = {"num_warps": 8, "maxnreg": 128}
"""The same of the backward kernel, which spills on sm_80 without a bound."""


@triton.jit  # type: ignore[untyped-decorator]
def history(  # type: ignore[no-untyped-def]
    ring,
    row,
    slot,
    total,
    inside,
    first: tl.constexpr,
    depth: tl.constexpr,
    block: tl.constexpr,
    every: tl.constexpr = False,
):
    """(b_k, m_{n-k}) for first <= k < min(first + GROUP, depth), as two tuples.

    A weight of exactly zero: masked off, so the slot is not read; with ``every`` it is.
    """
    weights = ()
    past = ()
    for k in tl.static_range(first, min(first + GROUP, depth)):
        b = tl.load(row + B + k)
        at = ((slot - k + depth) % depth).to(tl.int64) * total
        wanted = inside
        if not every:
            # Broadcast first: the interpreter loses the type of a scalar comparison otherwise.
            wanted = inside & (tl.broadcast_to(b, [block]) != 0)
        # Triton has no unpacking.
        weights = weights + (b,)  # type: ignore[assignment]  # noqa: RUF005
        past = past + (tl.load(ring + at, mask=wanted, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return weights, past


@triton.jit
def add_history(x_next, weights, past):  # type: ignore[no-untyped-def]
    """x_next + sum of b_k m_{n-k}, in the order of k, without the terms of weight zero."""
    for k in tl.static_range(len(past)):
        b = weights[k]
        x_next = tl.where(b != 0, x_next + mul(b, past[k]), x_next)
    return x_next


@triton.jit  # type: ignore[untyped-decorator]
def fused_row_kernel(  # type: ignore[no-untyped-def]
    f_ptr,  # [samples, n] network dtype
    f_cond_ptr,  # the same, or anything when not GUIDED
    x_ptr,  # [samples, n] state dtype
    ring_ptr,  # [DEPTH, total]
    row_ptr,  # [samples or 1, 6 + DEPTH]
    x_next_ptr,  # [samples, n]; may be x_ptr
    m_ptr,  # [samples, n], or the ring when M_TO_RING
    input_ptr,  # [samples, n] network dtype
    n,  # elements that share a row: the whole batch (one "sample") for a static row
    blocks,  # programs for each sample
    total,  # elements of a ring slot
    row_stride,  # numbers between the rows of two samples, 0 when all share one
    DEPTH: tl.constexpr,
    GUIDED: tl.constexpr,
    EACH: tl.constexpr,  # a row for each sample
    M_TO_RING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward: one program is BLOCK elements of one sample."""
    program = tl.program_id(0)
    sample = program // blocks if EACH else 0  # in 32 bits: 64 are a long subroutine
    lane = (program - sample * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    at = lane
    row = row_ptr
    if EACH:
        at += sample.to(tl.int64) * n  # type: ignore[union-attr]
        row += sample.to(tl.int64) * row_stride  # type: ignore[union-attr]

    # All loads before their first use, or each would be a wait of its own.
    c_skip = tl.load(row + C_SKIP)
    c_out = tl.load(row + C_OUT)
    a = tl.load(row + A)
    c_in = tl.load(row + C_IN)
    guidance = tl.load(row + GUIDANCE)
    slot = ring_slot(tl.load(row + SLOT), DEPTH)
    b0 = tl.load(row + B)
    x = tl.load(x_ptr + at, mask=inside)
    f = tl.load(f_ptr + at, mask=inside)
    f_cond = f
    if GUIDED:
        f_cond = tl.load(f_cond_ptr + at, mask=inside)
    weights, past = history(ring_ptr + at, row, slot, total, inside, 1, DEPTH, BLOCK)

    output = mixed_branches(f.to(x.dtype), f_cond.to(x.dtype), guidance, GUIDED)
    m = mul(c_skip, x) + mul(c_out, output)
    x_next = mul(a, x)
    x_next = tl.where(b0 != 0, x_next + mul(b0, m), x_next)
    x_next = add_history(x_next, weights, past)
    for first in tl.static_range(1 + GROUP, DEPTH, GROUP):
        weights, past = history(ring_ptr + at, row, slot, total, inside, first, DEPTH, BLOCK)
        x_next = add_history(x_next, weights, past)

    m_at = at
    if M_TO_RING:
        m_at = slot.to(tl.int64) * total + at
    tl.store(m_ptr + m_at, m, mask=inside)
    tl.store(x_next_ptr + at, x_next, mask=inside)
    scaled = mul(c_in, x_next)
    tl.store(input_ptr + at, to_network(scaled, input_ptr.dtype.element_ty), mask=inside)


@triton.jit
def wide_product(u, v):  # type: ignore[no-untyped-def]
    """U * v in float64, to be summed."""
    return u.to(tl.float64) * v.to(tl.float64)


@triton.jit
def add_two(a0, a1, b0, b1):  # type: ignore[no-untyped-def]
    """Two sums at once."""
    return a0 + b0, a1 + b1


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):  # type: ignore[no-untyped-def]
    """Four sums at once."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


if knobs.runtime.interpret:

    @triton.jit
    def sums(products):  # type: ignore[no-untyped-def]
        """The sum of each; the interpreter walks through a reduction of several number by number."""
        found = ()
        for i in tl.static_range(len(products)):
            found = found + (tl.sum(products[i], axis=0),)  # type: ignore[assignment]  # noqa: RUF005
        return found

else:

    @triton.jit
    def sums(products):  # type: ignore[no-untyped-def]
        """The sum of each, by a tree that the block's shape fixes.

        Four go through the warps' exchanges together, or each would wait for the one before it.
        """
        found = ()
        for i in tl.static_range(0, len(products) - len(products) % 4, 4):
            four = (products[i], products[i + 1], products[i + 2], products[i + 3])
            found = found + tl.reduce(four, 0, add_four)
        done: tl.constexpr = len(products) - len(products) % 4
        if len(products) - done >= 2:
            found = found + tl.reduce((products[done], products[done + 1]), 0, add_two)
        if len(products) % 2 == 1:
            found = found + (tl.sum(products[len(products) - 1], axis=0),)  # type: ignore[assignment]  # noqa: RUF005
        return found


@triton.jit  # type: ignore[untyped-decorator]
def fused_row_backward_kernel(  # type: ignore[no-untyped-def]
    grad_x_next_ptr,  # [samples, n], as all below unless noted
    grad_m_ptr,
    grad_input_ptr,
    f_ptr,
    f_cond_ptr,
    x_ptr,
    ring_ptr,  # [DEPTH, total]
    row_ptr,  # [samples or 1, 6 + DEPTH]
    grad_f_ptr,
    grad_f_cond_ptr,
    grad_x_ptr,
    grad_ring_ptr,  # [DEPTH, total]
    partial_ptr,  # [samples, blocks, 6 + DEPTH] float64
    n,
    blocks,
    total,
    row_stride,
    DEPTH: tl.constexpr,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward: elementwise gradients and the block's part of each coefficient's sum.

    A program never spans two samples, so a sample's sums depend on its own size alone.
    """
    program = tl.program_id(0)
    sample = program // blocks  # in 32 bits: 64 are a long subroutine
    lane = (program - sample * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    at = sample.to(tl.int64) * n + lane
    row = row_ptr + sample.to(tl.int64) * row_stride
    partial = partial_ptr + program.to(tl.int64) * (B + DEPTH)

    # All loads before their first use and before any store, as in the forward kernel.
    slot = ring_slot(tl.load(row + SLOT), DEPTH)
    c_skip = tl.load(row + C_SKIP)
    c_out = tl.load(row + C_OUT)
    a = tl.load(row + A)
    c_in = tl.load(row + C_IN)
    guidance = tl.load(row + GUIDANCE)
    b0 = tl.load(row + B)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    f = tl.load(f_ptr + at, mask=inside, other=0.0)
    f_cond = f
    if GUIDED:
        f_cond = tl.load(f_cond_ptr + at, mask=inside, other=0.0)
    grad_input = tl.load(grad_input_ptr + at, mask=inside, other=0.0)
    grad_next = tl.load(grad_x_next_ptr + at, mask=inside, other=0.0)
    grad_m = tl.load(grad_m_ptr + at, mask=inside, other=0.0)
    weights, past = history(ring_ptr + at, row, slot, total, inside, 1, DEPTH, BLOCK, True)

    f = f.to(x.dtype)
    f_cond = f_cond.to(x.dtype)
    grad_input = grad_input.to(x.dtype)
    output = mixed_branches(f, f_cond, guidance, GUIDED)
    m = mul(c_skip, x) + mul(c_out, output)
    x_next = mul(a, x)
    x_next = tl.where(b0 != 0, x_next + mul(b0, m), x_next)
    grad_next += mul(c_in, grad_input)
    grad_m += mul(b0, grad_next)
    grad_output = mul(c_out, grad_m)
    tl.store(grad_x_ptr + at, mul(a, grad_next) + mul(c_skip, grad_m), mask=inside)
    grad_f = grad_output
    products = (wide_product(grad_m, x), wide_product(grad_m, output), wide_product(grad_next, x))
    if GUIDED:
        scaled = mul(guidance, grad_output)
        grad_f = grad_output - scaled
        grad_f_cond = to_network(scaled, grad_f_cond_ptr.dtype.element_ty)
        tl.store(grad_f_cond_ptr + at, grad_f_cond, mask=inside)
        products = products + (wide_product(grad_output, f_cond - f),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(grad_f_ptr + at, to_network(grad_f, grad_f_ptr.dtype.element_ty), mask=inside)
    products = products + (wide_product(grad_next, m),)  # type: ignore[assignment]  # noqa: RUF005

    unread = tl.zeros([BLOCK], x.dtype)  # x_next reads m itself, not the slot it will go to
    tl.store(grad_ring_ptr + slot.to(tl.int64) * total + at, unread, mask=inside)
    for first in tl.static_range(1, DEPTH, GROUP):
        if first > 1:
            weights, past = history(
                ring_ptr + at, row, slot, total, inside, first, DEPTH, BLOCK, True
            )
        for i in tl.static_range(len(past)):
            b = weights[i]
            # The gradient to a zero weight reads its slot, or learning could never leave zero; what
            # is not finite there counts as zero.
            finite = (past[i] - past[i]) == 0
            value = tl.where((tl.broadcast_to(b, [BLOCK]) != 0) | finite, past[i], 0.0)
            x_next = tl.where(b != 0, x_next + mul(b, value), x_next)
            past_at = ((slot - first - i + DEPTH) % DEPTH).to(tl.int64) * total + at
            tl.store(grad_ring_ptr + past_at, mul(b, grad_next), mask=inside)
            products = products + (wide_product(grad_next, value),)  # type: ignore[assignment]  # noqa: RUF005
    products = products + (wide_product(grad_input, x_next),)  # type: ignore[assignment]  # noqa: RUF005

    coefficients = sums(products)
    for i in tl.static_range(3):
        tl.store(partial + i, coefficients[i])
    tl.store(partial + C_IN, coefficients[len(products) - 1])
    if GUIDED:
        tl.store(partial + GUIDANCE, coefficients[3])
    else:
        tl.store(partial + GUIDANCE, 0.0)
    tl.store(partial + SLOT, 0.0)
    for k in tl.static_range(DEPTH):
        tl.store(partial + B + k, coefficients[3 + GUIDED + k])


@triton.jit  # type: ignore[untyped-decorator]
def sum_middle_kernel(  # type: ignore[no-untyped-def]
    in_ptr,  # [outer, count, width] float64
    out_ptr,  # [outer, width]
    count,
    width,
    BLOCK: tl.constexpr,
):
    """out[o, c] = sum over i of in[o, i, c], in an order fixed by count; one program each."""
    program = tl.program_id(0).to(tl.int64)
    outer = program // width
    column = program - outer * width
    sums = tl.zeros([BLOCK], tl.float64)
    start = tl.zeros([], tl.int64)
    while start < count:  # not range(): the interpreter's fails with NumPy >= 2.4
        i = start + tl.arange(0, BLOCK)
        at = (outer * count + i) * width + column
        sums += tl.load(in_ptr + at, mask=i < count, other=0.0)
        start += BLOCK
    tl.store(out_ptr + program, tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty))

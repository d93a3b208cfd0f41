"""Triton kernel of a DLMS designer's row: one program computes everything of one sample.

The meaning of all of it is `python/dlms_engine/policies/dlms.py` (design, coefficients, elimination of
the start state) and `Denoiser.preconditioning`; numbers and layouts are those of `ops/designer_row.py`.
The network's arithmetic is in the dtype of its parameters, everything else in float64. Sums run
in an order that the shapes fix, over one sample alone: no batch changes its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dlms_engine.kernels.triton.columns import C_IN, C_OUT, C_SKIP, GUIDANCE, SLOT, A, B


@triton.jit
def sine_cosine(x):  # type: ignore[no-untyped-def]
    """(sin x, cos x) in float64 for |x| < 1e6, to two units in the last place of 1.

    libdevice's reduce large arguments in local memory. Here x = k pi/2 + r with pi/2 in three parts,
    of which the first two times k are exact; then Taylor's series, |r| <= pi/4.
    """
    k = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - k * 1.5707963267341256
    r = r - k * 6.077100506303966e-11
    r = r - k * 2.0222662487959506e-21
    z = r * r
    s = -7.647163731819816e-13 + z * 2.8114572543455206e-15
    s = -2.505210838544172e-08 + z * (1.6059043836821613e-10 + z * s)
    s = -0.0001984126984126984 + z * (2.7557319223985893e-06 + z * s)
    s = -0.16666666666666666 + z * (0.008333333333333333 + z * s)
    s = r + r * (z * s)
    c = 4.779477332387385e-14 - z * 1.5619206968586225e-16
    c = 2.08767569878681e-09 + z * (-1.1470745597729725e-11 + z * c)
    c = 2.48015873015873e-05 + z * (-2.755731922398589e-07 + z * c)
    c = 0.041666666666666664 + z * (-0.001388888888888889 + z * c)
    c = 1.0 + z * (-0.5 + z * c)
    quadrant = k - 4.0 * tl.floor(k * 0.25)
    swap = (quadrant == 1.0) | (quadrant == 3.0)
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    sine = tl.where(quadrant >= 2.0, -sine, sine)
    cosine = tl.where((quadrant == 1.0) | (quadrant == 2.0), -cosine, cosine)
    return sine, cosine


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 to a few units in the last place (Kahan's quotient; x finite, exp(x) > 0)."""
    u = tl.exp(x)
    rest = u - 1.0
    whole = u == 1.0
    return tl.where(whole, x, rest * x / tl.log(tl.where(whole, 2.0, u)))


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Tanh, to one unit in the last place of 1: it is added to numbers of that size."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit  # type: ignore[untyped-decorator]
def alpha_sigma(t, constants, table, PROCESS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(alpha, sigma) of `processes.py` at t; the process's numbers begin at constants[8]."""
    if PROCESS == 0:  # EDM
        alpha = tl.full((), 1.0, tl.float64)
        sigma = t
    elif PROCESS == 1:  # VP
        integral = t * (0.5 * tl.load(constants + 8) * t + tl.load(constants + 9))
        alpha = tl.exp(-0.5 * integral)
        sigma = tl.sqrt(-expm1(-integral))
    elif PROCESS == 2:  # RectifiedFlow
        alpha = 1.0 - t
        sigma = t
    elif PROCESS == 3:  # Cosine
        angle = tl.load(constants + 8) * t
        offset = tl.load(constants + 9)
        norm = tl.load(constants + 10)
        _, alpha = sine_cosine(angle + offset)
        first, _ = sine_cosine(angle)
        second, _ = sine_cosine(angle + 2.0 * offset)
        alpha = alpha / norm
        sigma = tl.sqrt(first * second) / norm
    else:  # VPDiscrete
        levels = tl.load(constants + 8)
        position = t * levels
        knot = tl.maximum(tl.minimum(tl.floor(position), levels - 1.0), 0.0)
        weight = position - knot
        at = table + knot.to(tl.int32)
        log_alpha = (1.0 - weight) * tl.load(at) + weight * tl.load(at + 1)
        alpha = tl.exp(log_alpha)
        sigma = tl.sqrt(-expm1(2.0 * log_alpha))
    return alpha, sigma


@triton.jit  # type: ignore[untyped-decorator]
def preconditioned(alpha, sigma, data, NETWORK: tl.constexpr, NOISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(c_skip, c_out, c_in) of `Denoiser.preconditioning`; `data` is sigma_data."""
    one = tl.full((), 1.0, tl.float64)
    c_in = one
    if NETWORK == 0:  # edm
        var = (sigma / alpha) * (sigma / alpha) + data * data
        root = 1.0 / tl.sqrt(var)
        c_in = root / alpha
        c_skip = sigma / (alpha * alpha * var) if NOISE else data * data / var / alpha
        c_out = -data * root if NOISE else sigma / alpha * data * root
    elif NETWORK == 1:  # data
        c_skip = 1.0 / sigma if NOISE else 0.0 * one
        c_out = -alpha / sigma if NOISE else one
    elif NETWORK == 2:  # noise
        c_skip = 0.0 * one if NOISE else 1.0 / alpha
        c_out = one if NOISE else -sigma / alpha
    elif NETWORK == 3:  # velocity
        norm = alpha * alpha + sigma * sigma
        c_skip = sigma / norm if NOISE else alpha / norm
        c_out = alpha / norm if NOISE else -sigma / norm
    else:  # flow, reverse_flow
        norm = alpha + sigma
        c_skip = 1.0 / norm
        c_out = alpha / norm if NOISE else -sigma / norm
        if NETWORK == 5:
            c_out = -c_out
    return c_skip, c_out, c_in


@triton.jit  # type: ignore[untyped-decorator]
def encoded_features(  # type: ignore[no-untyped-def]
    features,  # [FEATURES] of one sample
    w1,  # [HIDDEN, FEATURES]
    b1,
    w2,  # [4, HIDDEN]
    b2,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """[4] in the parameters' dtype: linear, SiLU, linear."""
    dtype = w1.dtype.element_ty
    hidden = tl.arange(0, HIDDEN)
    column = tl.arange(0, CHUNK)
    sums = tl.zeros([HIDDEN, CHUNK], dtype)
    start = 0
    while start < FEATURES:  # not range(): the interpreter's fails with NumPy >= 2.4
        i = start + column
        f = tl.load(features + i, mask=i < FEATURES, other=0.0).to(dtype)
        at = hidden[:, None] * FEATURES + i[None, :]
        sums += tl.load(w1 + at, mask=(i < FEATURES)[None, :], other=0.0) * f[None, :]
        start += CHUNK
    inner = tl.sum(sums, axis=1) + tl.load(b1 + hidden)
    inner = inner * sigmoid(inner)
    out = tl.arange(0, 4)
    second = tl.load(w2 + out[:, None] * HIDDEN + hidden[None, :])
    return tl.sum(second * inner[None, :], axis=1) + tl.load(b2 + out)


@triton.jit
def embedded_time(t, rates, weight, bias):  # type: ignore[no-untyped-def]
    """[8] in the parameters' dtype: sines and cosines of t at four rates, linear, SiLU."""
    lane = tl.arange(0, 8)
    sine, cosine = sine_cosine(t * tl.load(rates + lane % 4))
    waves = tl.where(lane < 4, sine, cosine).to(weight.dtype.element_ty)
    mixed = tl.sum(tl.load(weight + lane[:, None] * 8 + lane[None, :]) * waves[None, :], axis=1)
    mixed += tl.load(bias + lane)
    return mixed * sigmoid(mixed)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def designer_row_kernel(  # type: ignore[no-untyped-def]
    features_ptr,  # [B, FEATURES]
    state_ptr,  # [B, 5 + ORDER] float64; not read by START
    w1_ptr,  # parameters of the encoder, the time embedding, the index embedding and the head
    b1_ptr,
    w2_ptr,
    b2_ptr,
    time_w_ptr,  # [8, 8]
    time_b_ptr,
    index_ptr,  # [STEPS, 8]
    head_ptr,  # [ORDER + 2, 20]
    bias_ptr,  # [STEPS, ORDER + 2]
    grid_ptr,  # [STEPS + 1] float64, as all below
    weights_ptr,  # [STEPS, ORDER]
    logits_ptr,  # [STEPS - 1]
    constants_ptr,  # [11]: time_range, scale_range, time_gain, -, four rates, the process's three
    table_ptr,  # log alpha of VPDiscrete
    guidance_ptr,  # []
    sigma_data_ptr,  # []
    next_state_ptr,  # [B, 5 + ORDER]
    row_ptr,  # [B, 6 + DEPTH]; START: [B] the first c_in
    c_noise_ptr,  # [B]
    n,  # evaluation, 0-based
    START: tl.constexpr,
    STEPS: tl.constexpr,
    ORDER: tl.constexpr,
    DEPTH: tl.constexpr,
    AFS: tl.constexpr,
    FEATURES: tl.constexpr,  # 0 without
    LOG: tl.constexpr,  # the coordinate of the times
    FROZEN: tl.constexpr,  # times stay those of the grid
    PROCESS: tl.constexpr,
    NOISE: tl.constexpr,  # the ring stores noise predictions
    NETWORK: tl.constexpr,
    LEVEL: tl.constexpr,  # c_noise is 0: ln(sigma / alpha) / 4, 1: t, 2: VPDiscrete's index
    LANES: tl.constexpr,  # power of two, at least ORDER + 2
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """START: the analytical first step, if there is one, and the first evaluation's numbers.

    Otherwise: the row after evaluation n, and the next evaluation's numbers.
    """
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    state = state_ptr + sample * (5 + ORDER)
    next_state = next_state_ptr + sample * (5 + ORDER)
    first = tl.load(grid_ptr)
    end = tl.load(grid_ptr + STEPS)
    network_time = first
    next_t = first
    step = tl.full((), 1, tl.int32)  # 1-based, as in DLMS Algorithm 2
    t = first
    if not START:
        step += n + AFS
        t = tl.load(state)
    order = tl.minimum(step, ORDER)
    used = lane < order
    weights = tl.zeros([LANES], tl.float64)

    if AFS or not START:
        wave = embedded_time(t, constants_ptr + 4, time_w_ptr, time_b_ptr)
        row_of_head = head_ptr + lane[:, None] * 20
        outputs = lane < ORDER + 2
        eight = tl.arange(0, 8)
        w = tl.load(row_of_head + 4 + eight[None, :], mask=outputs[:, None], other=0.0)
        raw = tl.sum(w * wave[None, :], axis=1)
        w = tl.load(row_of_head + 12 + eight[None, :], mask=outputs[:, None], other=0.0)
        index = tl.load(index_ptr + (step - 1) * 8 + eight)
        raw += tl.sum(w * index[None, :], axis=1)
        if FEATURES > 0 and not START:
            features = features_ptr + sample * FEATURES
            code = encoded_features(
                features, w1_ptr, b1_ptr, w2_ptr, b2_ptr, FEATURES, HIDDEN, CHUNK
            )
            four = tl.arange(0, 4)
            w = tl.load(row_of_head + four[None, :], mask=outputs[:, None], other=0.0)
            raw += tl.sum(w * code[None, :], axis=1)
        bias = bias_ptr + (step - 1) * (ORDER + 2)
        raw = (raw + tl.load(bias + lane, mask=outputs, other=0.0)).to(tl.float64)

        z = tl.where(used, raw, 0.0)
        weights = tl.load(weights_ptr + (step - 1) * ORDER + lane, mask=used, other=0.0)
        weights += z - tl.sum(z, axis=0) / order.to(tl.float64)
        weights = tl.where(used, weights, 0.0)
        gain = tl.load(constants_ptr + 2)
        if FROZEN:
            next_t = tl.load(grid_ptr + step)
        else:
            bound = tl.load(constants_ptr)
            logit = tl.load(logits_ptr + (step - 1), mask=step < STEPS, other=0.0)
            moved = gain * tl.sum(tl.where(lane == ORDER, raw, 0.0), axis=0)
            fraction = sigmoid(logit + bound * tanh(moved / bound))
            if LOG:
                here = tl.log(t)
                next_t = tl.exp(here + fraction * (tl.log(end) - here))
            else:
                next_t = t + fraction * (end - t)
        stretch = gain * tl.sum(tl.where(lane == ORDER + 1, raw, 0.0), axis=0)
        network_time = (1.0 + tl.load(constants_ptr + 1) * tanh(stretch)) * next_t
        network_time = tl.minimum(tl.maximum(network_time, end), first)
    last = step == STEPS
    if not START:
        next_t = tl.where(last, end, next_t)
        # No evaluation follows the last row: any time with finite numbers will do.
        network_time = tl.where(last, t, network_time)

    alpha, sigma = alpha_sigma(network_time, constants_ptr, table_ptr, PROCESS)
    data = tl.load(sigma_data_ptr)
    c_skip, c_out, c_in = preconditioned(alpha, sigma, data, NETWORK, NOISE)
    c_noise = network_time
    if LEVEL == 0:
        c_noise = tl.log(sigma / alpha) / 4.0
    elif LEVEL == 2:
        c_noise = tl.load(constants_ptr + 8) * network_time - 1.0
    tl.store(c_noise_ptr + sample, c_noise.to(c_noise_ptr.dtype.element_ty))

    _, sigma_first = alpha_sigma(first, constants_ptr, table_ptr, PROCESS)
    dtype = row_ptr.dtype.element_ty
    past = tl.zeros([LANES], tl.float64)
    start_weight = tl.full((), 1.0, tl.float64)
    if START:
        if AFS:
            _, sigma_next = alpha_sigma(next_t, constants_ptr, table_ptr, PROCESS)
            start_weight = sigma_next / sigma_first
        tl.store(row_ptr + sample, (c_in * start_weight).to(dtype))
    else:
        alpha_here, sigma_here = alpha_sigma(t, constants_ptr, table_ptr, PROCESS)
        alpha_next, sigma_next = alpha_sigma(next_t, constants_ptr, table_ptr, PROCESS)
        if NOISE:
            a = alpha_next / alpha_here
            c = sigma_next - sigma_here * a
        else:
            a = sigma_next / sigma_here
            c = alpha_next - alpha_here * a
        real = used & (lane <= n)  # the other weight, if any, is that of the analytical output
        b = tl.where(real, c * weights, 0.0)
        carried = tl.load(state + 4)  # weight of the noise in x_n; of x itself before row 0
        scale = tl.where(n == 0, carried, 1.0)
        if AFS and NOISE:
            # The newest output is not in x_n yet: past[k] is the weight of m_{n-k} there.
            past = tl.load(state + 4 + lane, mask=(lane >= 1) & (lane < ORDER), other=0.0)
            pseudo = tl.sum(tl.where(used & (lane == n + 1), weights, 0.0), axis=0)
            pseudo = c * pseudo / sigma_first
            start_weight = a * carried + pseudo
            through = pseudo / carried
            a += through
            b = tl.where(real, b - through * past, 0.0)
            past = a * past + b
        row = row_ptr + sample * (B + DEPTH)
        tl.store(row + C_SKIP, (tl.load(state + 1) * scale).to(dtype))
        tl.store(row + C_OUT, tl.load(state + 2).to(dtype))
        tl.store(row + A, (a * scale).to(dtype))
        tl.store(row + C_IN, tl.where(last, tl.load(state + 3), c_in).to(dtype))
        tl.store(row + GUIDANCE, tl.load(guidance_ptr).to(dtype))
        tl.store(row + SLOT, (n % DEPTH).to(tl.float64).to(dtype))
        tl.store(row + B + lane, b.to(dtype), mask=lane < DEPTH)

    tl.store(next_state, next_t)
    tl.store(next_state + 1, c_skip)
    tl.store(next_state + 2, c_out)
    tl.store(next_state + 3, c_in)
    tl.store(next_state + 4, start_weight)
    tl.store(next_state + 5 + lane, past, mask=lane < ORDER)

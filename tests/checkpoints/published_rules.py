"""The published update rules of DyWeight, EPD, GAS and LD3, as plain loops in float64.

``denoise(x, level)`` is E[x0 | x] at alpha = 1; of a flow, at its time. Written from the papers' update
rules, apart from the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
ADAMS = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def powers(points: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Karras et al. 2022, eq. 5."""
    s = torch.arange(points, dtype=torch.float64) / (points - 1)
    return (high ** (1 / rho) + s * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def uniform_in_vp_time(points: int, low: float = 0.002, high: float = 80.0) -> Tensor:
    """Levels at uniform times of the line through both ends, at 1e-3 and 1."""
    e = 1e-3
    bend = 2 * (math.log(low**2 + 1) / e - math.log(high**2 + 1)) / (e - 1)
    base = math.log(high**2 + 1) - bend / 2
    t = torch.linspace(1, e, points, dtype=torch.float64)
    return torch.sqrt(torch.exp(bend * t**2 / 2 + base * t) - 1)


def dyweight(
    denoise: Denoise, levels: Tensor, weights: Tensor, scales: Tensor, z: Tensor, *, afs: bool
) -> Tensor:
    x, now, directions = z * levels[0], levels[0], []
    for i in range(len(levels) - 1):
        if afs and i == 0:
            d = x / math.sqrt(1 + float(now) ** 2)
        else:
            d = (x - denoise(x, abs(scales[i - int(afs)] * now))) / (now + 1e-8)
        directions.append(d)
        row = weights[i, : i + 1]
        x = x + (levels[i + 1] - now) * sum(w * d for w, d in zip(row, directions, strict=False))
        now = now + row.sum() * (levels[i + 1] - now)
    return x


def dyweight_flow(
    denoise: Denoise, weights: Tensor, scales: Tensor, x: Tensor, mu: float
) -> Tensor:
    """On velocities, from 1 to 0 at times moved by e^mu."""
    u = torch.linspace(1, 0, len(weights) + 1, dtype=torch.float64)
    times = math.exp(mu) / (math.exp(mu) + 1 / u - 1)
    now, velocities = times[0], []
    for i, row in enumerate(weights):
        told = scales[i] * now
        velocities.append((x - denoise(x, told)) / told)
        x = x + (times[i + 1] - now) * sum(
            w * v for w, v in zip(row[: i + 1], velocities, strict=False)
        )
        now = now + row.sum() * (times[i + 1] - now)
    return x


def epd(
    denoise: Denoise,
    levels: Tensor,
    parameters: dict[str, Tensor],
    x: Tensor,
    *,
    bounds: tuple[float, float] = (0.05, 0.2),
    order: int = 1,
    afs: bool = False,
    fcn: bool = False,
) -> Tensor:
    """``x`` is the state at the start; points one after the other."""
    sigmoid = torch.sigmoid
    older: list[Tensor] = []
    for i in range(len(levels) - 1):
        t, end = levels[i], levels[i + 1]
        d = x / torch.sqrt(1 + t**2) if afs and i == 0 else (x - denoise(x, t)) / t
        older = [d, *older][:order]
        mean = sum(w * h for w, h in zip(ADAMS[len(older) - 1], older, strict=False))
        weight = torch.exp(parameters["weight_s"][i])
        weight = weight / weight.sum()
        following = x
        for k in range(len(weight)):
            r = sigmoid(parameters["r_params"][i, k])
            c = 2 * bounds[0] * sigmoid(parameters["scale_dir_params"][i, k] / 2) + 1 - bounds[0]
            a = 2 * bounds[1] * sigmoid(parameters["scale_time_params"][i, k] / 2) + 1 - bounds[1]
            if fcn and i == len(levels) - 2:
                c = torch.ones(())
            middle = torch.exp(r * end.log() + (1 - r) * t.log())
            y = x + (middle - t) * mean
            slope = (y - denoise(y, a * middle)) / middle
            following = following + weight[k] * c * (end - t) * slope
        x = following
    return x


def gas(denoise: Denoise, parameters: list[Tensor], z: Tensor, t_eps: float) -> Tensor:
    """On VP states with beta 0.1 to 20; returns the state over alpha. The network is EDM's."""
    logits, shifts, *pairs = parameters
    a, c = pairs[1::2], pairs[0::2]
    order, steps = len(a), len(shifts)
    mu = torch.sigmoid(logits) * (1 - 2e-5) + 1e-5
    rising = [t_eps, *((1 - torch.cumprod(mu, 0)) * (1 - t_eps) + t_eps).tolist(), 1.0]
    times = [torch.tensor(t, dtype=torch.float64) for t in reversed(rising)]

    def alpha(t: Tensor) -> Tensor:
        return torch.exp(-0.25 * 19.9 * t**2 - 0.5 * 0.1 * t)

    def sigma(t: Tensor) -> Tensor:
        return torch.sqrt(1 - alpha(t) ** 2)

    def half_log_snr(t: Tensor) -> Tensor:
        return torch.log(alpha(t) / sigma(t))

    def data(x: Tensor, n: int) -> Tensor:
        t, told = times[n], times[n] + shifts[n]
        clean = denoise(x / alpha(told), sigma(told) / alpha(told))
        noise = (x - alpha(told) * clean) / sigma(told)
        return (x - sigma(t) * noise) / alpha(t)

    x, states, outputs = z, [], []
    for n in range(steps):
        states, outputs = [*states, x][-order:], [*outputs, data(x, n)][-order:]
        t, end = times[n], times[n + 1]
        h = half_log_snr(end) - half_log_snr(t)
        p1 = torch.expm1(-h)
        p2 = p1 / h + 1
        p3 = p2 / h - 0.5
        new = (sigma(end) / sigma(t) + a[0][n]) * x - (alpha(end) * p1 + c[0][n]) * outputs[-1]
        if len(outputs) >= 2:
            r0 = (half_log_snr(t) - half_log_snr(times[n - 1])) / h
            first = (outputs[-1] - outputs[-2]) / r0
        if len(outputs) == 2:
            new = new - (0.5 * alpha(end) * p1 + c[1][n]) * first
        if len(outputs) >= 3:
            r1 = (half_log_snr(times[n - 1]) - half_log_snr(times[n - 2])) / h
            other = (outputs[-2] - outputs[-3]) / r1
            slope = first + r0 / (r0 + r1) * (first - other)
            bend = (first - other) / (r0 + r1)
            new = new + (alpha(end) * p2 + c[1][n]) * slope - (alpha(end) * p3 + c[2][n]) * bend
        for k in range(4, len(outputs) + 1):
            new = new + c[k - 1][n] * outputs[-k]
        for k in range(2, len(outputs) + 1):
            new = new + a[k - 1][n] * states[-k]
        x = new
    return x / alpha(times[-1])


def ld3(
    denoise: Denoise, name: str, grid: Tensor, network: Tensor, x: Tensor, order: int, variant: str
) -> Tensor:
    """On EDM's levels: data predictions of uni_pc and dpm_solver++, noise of ipndm and euler."""
    if name in ("euler", "ipndm"):
        noises: list[Tensor] = []
        for i in range(len(grid) - 1):
            noises = [(x - denoise(x, network[i])) / network[i], *noises][: max(order, 1)]
            weights = ADAMS[len(noises) - 1]
            x = x + (grid[i + 1] - grid[i]) * sum(
                w * n for w, n in zip(weights, noises, strict=False)
            )
        return x
    return _unipc(denoise, grid, network, x, order, variant if name == "uni_pc" else "")


def _unipc(
    denoise: Denoise, grid: Tensor, network: Tensor, x: Tensor, order: int, variant: str
) -> Tensor:
    """UniPC with its corrector; without a variant DPM-Solver++."""
    steps, lam = len(grid) - 1, -grid.log()
    history = [(lam[0], denoise(x, network[0]))]
    for n in range(1, steps + 1):
        p = n if n < order else min(order, steps + 1 - n)
        (now, m), h = history[0], lam[n] - history[0][0]
        base = grid[n] / grid[n - 1] * x - torch.expm1(-h) * m
        if not variant:
            x = _plus_plus(base, history[:p], h)
        else:
            past = [(((la - now) / h), mk) for la, mk in history[1:p]]
            x = _moved(base, past, m, h, p - 1, variant)
        if n == steps:
            return x
        new = denoise(x, network[n])
        if variant:
            x = _moved(base, [*past, (torch.ones(()).double(), new)], m, h, p, variant)
        history = [(lam[n], new), *history][:order]
    raise AssertionError


def _plus_plus(base: Tensor, history: list[tuple[Tensor, Tensor]], h: Tensor) -> Tensor:
    e1 = torch.expm1(-h)
    if len(history) == 1:
        return base
    (l0, m0), (l1, m1) = history[:2]
    d0 = (m0 - m1) * h / (l0 - l1)
    if len(history) == 2:
        return base - e1 / 2 * d0
    l2, m2 = history[2]
    r0, r1 = (l0 - l1) / h, (l1 - l2) / h
    d1 = (m1 - m2) / r1
    e2 = e1 / h + 1
    slope, bend = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
    return base + e2 * slope - (e2 / h - 0.5) * bend


def _moved(
    base: Tensor,
    points: list[tuple[Tensor, Tensor]],
    m: Tensor,
    h: Tensor,
    order: int,
    variant: str,
) -> Tensor:
    """base - B(h) sum_k rho_k (m_k - m) / r_k with R rho = b (Zhao et al. 2023, section 3)."""
    if order == 0:
        return base
    hh = -float(h)
    scale = hh if variant == "bh1" else math.expm1(hh)
    phi, factorial, rows, right = math.expm1(hh) / hh - 1, 1, [], []
    for k in range(1, order + 1):
        rows.append([float(r) ** (k - 1) for r, _ in points])
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    rho = [0.5]  # both the predictor of order 2 and the corrector of order 1
    if order > 1:
        rho = np.linalg.solve(np.array(rows), np.array(right)).tolist()
    return base - scale * sum(w * (mk - m) / r for w, (r, mk) in zip(rho, points, strict=False))

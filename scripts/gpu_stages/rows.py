"""Stage: one backend's fused row, forward and backward, against the eager reference and float64."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import checks
import torch
from kernel_cases import (
    DTYPES,
    Case,
    assert_no_worse_than_eager,
    assert_same_bits,
    make_case,
    truth_of,
)

from dlms_engine import ops
from dlms_engine.ops import layout, reference

SHAPES = ((3, 3, 5, 7), (2, 2051), (5, 1), (1, 4, 64, 64))
"""Full and ragged blocks, one sample and many, sizes that vectors of 16 bytes do not divide."""
LARGE = ((64, 3, 32, 32), (2, 16, 128, 128))
"""At one depth only: the reference runs on the CPU."""
DEPTHS = {"cuda": (3, 2, 1, 4, 6, 12), "triton": (3, 1, 5)}
"""Triton compiles every depth, dtype and guidance on first use, which takes a second or so."""


def worst(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest error relative to the largest entry."""
    scale = truth.abs().max().item() or 1.0
    return float((got.cpu().double() - truth).abs().max().item() / scale)


def forward(backend: ops.Backend, device: str, case: Case) -> float:
    """Functional and in place: the reference's bits, and its error against float64."""
    want, truth = reference.fused_row(*case.forward()), truth_of(case)
    there = case.to(device)
    got = backend.fused_row(*there.forward())
    assert_same_bits(got, want, "functional")
    for g, w, t in zip(got, want, truth, strict=True):
        assert_no_worse_than_eager(g, w, t)
    network_input = torch.full_like(there.f, float("nan"))
    backend.fused_row_(*there.forward(), network_input)
    ring = case.ring.clone()
    reference.write_slot(ring, case.row, want[1])
    assert_same_bits((there.x, there.ring, network_input), (want[0], ring, want[2]), "in place")
    return max(worst(g, t) for g, t in zip(got, truth, strict=True))


def backward(backend: ops.Backend, device: str, case: Case) -> float:
    """The elementwise gradients' bits, the coefficients' sums, both against float64."""
    got = backend.fused_row_backward(*case.to(device).backward())
    want = reference.fused_row_backward(*case.backward())
    truth = reference.fused_row_backward(*case.double().backward())
    assert_same_bits(
        tuple(g for g in got[:4] if g is not None), tuple(w for w in want[:4] if w is not None)
    )
    # The sums differ in order only, in float64, before one rounding to the row's dtype.
    terms = case.x.numel() / (1 if case.row.dim() == 1 else case.x.shape[0])
    bound = torch.finfo(got[4].dtype).eps * want[4].abs() + terms**2 * 2.0**-52 * 16
    if not ((got[4].cpu() - want[4]).abs() <= bound).all():
        raise AssertionError(f"coefficient sums differ by {(got[4].cpu() - want[4]).abs().max()}")
    pairs = [(g, t) for g, t in zip(got, truth, strict=True) if t is not None and t.numel()]
    return max(worst(g, t) for g, t in pairs)


def cases(backend: str, dtype: torch.dtype) -> list[tuple[tuple[int, ...], int]]:
    """(shape, depth) of one check."""
    depths = DEPTHS[backend] if dtype == torch.float32 else DEPTHS[backend][:2]
    return [*itertools.product(SHAPES, depths), *((shape, depths[0]) for shape in LARGE)]


def check(
    name: str, backend: ops.Backend, device: str, dtype: torch.dtype, each: bool, guided: bool
) -> dict[str, Any]:
    """All shapes and depths of one kind of row."""
    errors: dict[str, list[float]] = {"forward": [], "backward": []}
    chosen = cases(name, dtype)
    for seed, (shape, depth) in enumerate(chosen):
        case = make_case(shape, depth, dtype, per_sample=each, guided=guided, seed=seed)
        try:
            errors["backward"].append(backward(backend, device, case))
            errors["forward"].append(forward(backend, device, case))
        except AssertionError as error:
            raise AssertionError(f"{shape} depth {depth}: {error}") from error
    return {
        "cases": len(chosen),
        "shapes": [list(shape) for shape in (*SHAPES, *LARGE)],
        "depths": sorted({depth for _, depth in chosen}),
        "forward_error_to_float64": max(errors["forward"]),
        "backward_error_to_float64": max(errors["backward"]),
    }


def zero_weight_slots_are_not_read(backend: ops.Backend, device: str) -> dict[str, Any]:
    """A slot of zero weight may hold NaN; one of nonzero weight must show it."""
    case = make_case((2, 3, 8, 8), 4)
    case.row[layout.B + 2] = 0.0
    clean = reference.fused_row(*case.forward())
    case.ring[(int(case.row[layout.SLOT]) - 2) % 4] = float("nan")
    got = backend.fused_row(*case.to(device).forward())
    assert_same_bits(got, clean)
    case.row[layout.B + 2] = 1.0
    poisoned = backend.fused_row(*case.to(device).forward())
    assert bool(poisoned[0].isnan().all()), "the poison is not seen"
    return {}


def main() -> int:
    parser = checks.options(__doc__ or "")
    parser.add_argument("--backend", choices=sorted(DEPTHS), required=True)
    parser.add_argument("--stand-in", help="the backend that is run in a rehearsal")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backend = ops.select(args.stand_in or args.backend, args.device)
    run = checks.Checks(
        f"rows-{args.backend}", args.output, args.seconds, backend=backend.name, device=args.device
    )
    kinds = list(itertools.product(DTYPES, (False, True), (False, True)))
    kinds.sort(key=lambda kind: kind[1] != kind[2])  # plain rows, then both at once, then the rest
    for dtype, each, guided in kinds:
        rows = "a row for each sample" if each else "a shared row"
        label = f"{str(dtype).removeprefix('torch.')}, {rows}{', guided' if guided else ''}"
        run.run(label, lambda: check(args.backend, backend, args.device, dtype, each, guided))  # noqa: B023
    run.run(
        "slots of zero weight are not read",
        lambda: zero_weight_slots_are_not_read(backend, args.device),
    )
    return run.status()


if __name__ == "__main__":
    sys.exit(main())

"""How the search for a start measures: on how many samples, and how many solvers go on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """How many samples and how many tables each round measures.

    Attributes:
        samples: of every round, those of the rounds before included.
        keep: tables left after each round.
        proof_samples, first_steps: of the exact solution's proof.
    """

    samples: tuple[int, ...]
    keep: tuple[int, ...]
    proof_samples: int
    first_steps: int

    def cost(self, first: int, nfe: int, solving: int | None = None) -> int:
        """Evaluations of one sample that they take, ``first`` for all tables on one sample.

        Args:
            solving: evaluations of one exact end where the proof is there; None is before it.
        """
        total, before = 0, 0
        each_end = 2 * self.first_steps if solving is None else solving
        for round_, samples in enumerate(self.samples):
            each = first if round_ == 0 else nfe * self.keep[round_ - 1]
            total += each * (samples - before)
            total += each_end * (samples - before)
            before = samples
        if solving is not None:
            return total
        pairs = 3 * 5 * self.first_steps + 4 * self.first_steps
        return total + pairs * self.proof_samples


FULL = Rounds((8, 32, 64), (24, 6, 6), 8, 24)
WIDER = (
    Rounds((16, 64, 256, 1024), (48, 24, 12, 6), 8, 24),
    Rounds((16, 64, 256), (48, 24, 12), 8, 24),
)
"""From all solvers again, where the last round shows that a few samples hold the error (those that end
in another mode) and what is left pays for it."""
MOST_SAMPLES = 1024
"""Up to which the solvers that are left are measured on twice as many samples, again and again: where a
few samples hold the error, as long as that is paid for, else as long as it costs ``SURE`` of what is
left. On the errors of 13 mixtures at 3, 5 and 8 evaluations the best solver's RMSE is this share of that
of the solver which the search finds, on average and in the lowest tenth (``FULL`` or ``SMALLER`` alone in
brackets): .82 and .52 (.73 and .43) for a budget of 10k, .90 and .60 (.86 and .53) for 40k, .97 and .89
(.88 and .56) for 300k, .99 and .99 for 600k."""
SURE = 0.05
AGAIN = 1.5
"""A search may take this many times its limit where a few samples hold the error: there the choice of the
solver is worth more than training, which learns little from such samples."""
IMPRECISE = 0.07
"""Standard error of the best RMSE, as a share of it, from which on a few samples hold the error, and
those solvers that are left are measured on more samples."""
HOLD = 0.15
"""Effective share of the samples, below which all solvers are: what the first samples said of them is
worth little. (Whenever the error is imprecise, that took two fifths of ten minutes of a 64x64 network,
for the same solver; on the mixtures above it finds hardly better ones.)"""
SMALLER = (
    Rounds((8, 32), (12, 6), 8, 24),
    Rounds((4, 16), (12, 6), 4, 24),
    Rounds((2, 8), (12, 6), 2, 24),
)
"""Of every solver, too, for budgets that do not pay for the full search: what the lean one leaves out is
the best of some models by a factor of three."""
LEAN = (Rounds((2, 8), (6, 4), 1, 12), Rounds((1, 4), (6, 4), 1, 12))
"""From the better to the cheaper; the first of at most 1,500 evaluations is taken."""
MOST_LEAN = 1_500

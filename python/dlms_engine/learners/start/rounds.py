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

    def cost(self, first: int, nfe: int) -> int:
        """Evaluations of one sample that they take, ``first`` for all tables on one sample."""
        total, before = 0, 0
        for round_, samples in enumerate(self.samples):
            each = first if round_ == 0 else nfe * self.keep[round_ - 1]
            total += each * (samples - before)
            total += 2 * self.first_steps * (samples - before)  # exact ends
            before = samples
        pairs = 3 * 5 * self.first_steps + 4 * self.first_steps
        return total + pairs * self.proof_samples


FULL = Rounds((8, 32, 64), (24, 6, 6), 8, 24)
WIDER = (
    Rounds((16, 64, 256, 1024), (48, 24, 12, 6), 8, 24),
    Rounds((16, 64, 256), (48, 24, 12), 8, 24),
)
"""After ``FULL``, from all solvers again, where its last round shows that a few samples hold the error
(those that end in another mode) and a given limit pays for it. On eleven mixtures the best solver's RMSE
is 0.88 of that of the solver which ``FULL`` finds, on average, and 0.56 in the lowest tenth; by 1024
samples 0.99 and 0.98."""
IMPRECISE = 0.07
"""Standard error of the best RMSE, as a share of it, from which on a few samples hold the error."""
SMALLER = (Rounds((8, 32), (12, 6), 8, 24), Rounds((4, 16), (12, 6), 4, 24))
"""Of every solver, too, for budgets that do not pay for the full search: what the lean one leaves out is
the best of some models by a factor of three."""
LEAN = (Rounds((2, 8), (6, 4), 1, 12), Rounds((1, 4), (6, 4), 1, 12))
"""From the better to the cheaper; the first of at most 1,500 evaluations is taken."""
MOST_LEAN = 1_500

"""How many samples a table is fitted to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

SEARCHED = 64
"""Samples that dampings are compared on, of errors that none of them holds."""
MOST = 4096
LEAST_RESIDUALS = 20
"""A parameter, at least: nine images of 8x8 for fifty parameters fit their own noise."""
LEAST_EFFECTIVE = 1 / 16


def samples_for(parameters: int, numbers: int) -> int:
    """How many training samples of ``numbers`` numbers this many parameters need.

    Four hundred residuals a parameter, as neighbouring pixels err alike: with a fifth of that, 64
    images of 8x8 for 31 parameters, the error on other samples was a fifth above that on these.
    """
    return min(MOST, max(64, math.ceil(400 * parameters / numbers)))


@dataclass(frozen=True)
class Counts:
    """Samples of one fit.

    Where a few samples hold most of the squared error, the others say little about the table: on a
    published network whose start has a tenth of its samples' worth (``Start.effective``) 64 samples
    took the RMSE on them to a third and that on others to 1.8 times the start's, 256 took it to .73.

    Attributes:
        least, most: of an iteration.
        searched: that dampings, and fits, are compared on, at most.
    """

    least: int
    most: int
    searched: int

    @classmethod
    def of(
        cls,
        parameters: int,
        numbers: int,
        most: int | None = None,
        effective: float = 1.0,
        pays: float = 0.0,
    ) -> Counts:
        """For a table of ``parameters`` on samples of ``numbers`` numbers.

        Args:
            most: as given by the user.
            effective: share of the samples that hold the squared error.
            pays: samples that the budget has for more of them than one each would ask for.
        """
        effective = max(effective, LEAST_EFFECTIVE)
        least = max(4, math.ceil(LEAST_RESIDUALS * parameters / numbers))
        if most is None:
            wanted = samples_for(parameters, numbers)
            many = min(MOST, math.ceil(wanted / effective))
            most = max(wanted, least, int(min(many, pays)))
        searched = max(SEARCHED, int(min(math.ceil(SEARCHED / effective), pays)))
        return cls(min(least, most), most, min(most, searched))

    @property
    def first(self) -> int:
        """Of the first iteration."""
        return min(self.most, max(16, self.most // 4))

    def state(self) -> dict[str, int]:
        """JSON values, the arguments again."""
        return asdict(self)

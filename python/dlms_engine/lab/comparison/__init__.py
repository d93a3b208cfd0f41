"""Every learner at the same number of evaluations and the same budget, measured side by side."""

from .contestants import CONTESTANTS, STUDIES, Contestant, choose
from .run import CompareSettings, compare

__all__ = ["CONTESTANTS", "STUDIES", "CompareSettings", "Contestant", "choose", "compare"]

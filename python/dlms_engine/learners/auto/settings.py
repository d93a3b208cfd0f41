"""Settings of ``method="auto"``; none is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .budget import parse_budget


@dataclass(frozen=True)
class AutoSettings:
    """What the general learner may do.

    Attributes:
        nfe: network evaluations of the result.
        budget: minutes (10, "10m", "2h") or network evaluations of one sample ("50000calls", "50k").
            With evaluations a run is repeated to the bit on the same machine; with minutes it does as
            much as the machine allows.
        base: label of the handcrafted solver to start from, as ``dlms recommend`` prints it; "best"
            measures all of them.
        effort: of that measurement, "full", "lean" or "auto" (by the network's speed).
        samples: most samples that are trained on; None to follow the number of parameters and the budget.
        depth: outputs a row may weigh; None for all up to six evaluations, else four.
        corrector: whether a small residual after the last row is tried.
        feature_phase: whether it is also trained on the feature distance, where the denoiser taps
            features.
        afs: whether the first network input may be rescaled: by an analytical first step among the
            bases, and by the table's fit. Pipelines that do not scale it themselves cannot run that.
        held_out: samples that choose among the stages, never trained on.
    """

    nfe: int = 5
    budget: str | float = "10m"
    base: str = "best"
    effort: Literal["full", "lean", "auto"] = "auto"
    samples: int | None = None
    depth: int | None = None
    corrector: bool = True
    feature_phase: bool = True
    afs: bool = True
    held_out: int = 256

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"nfe is {self.nfe}, expected at least 1")
        if self.effort not in ("full", "lean", "auto"):
            raise ValueError(f"effort is {self.effort!r}, expected 'full', 'lean' or 'auto'")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth is {self.depth}, expected None or at least 1")
        if self.samples is not None and self.samples < 4:
            raise ValueError(f"samples is {self.samples}, expected None or at least 4")
        if self.held_out < 8:
            raise ValueError(f"held_out is {self.held_out}, expected at least 8")
        parse_budget(self.budget)

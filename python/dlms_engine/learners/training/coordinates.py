"""The coordinates a per-sample learner works in: the papers' (EDM's) or the process's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ...models.denoiser import Denoiser
from ...policies.amed import AmedPolicy
from ...policies.coordinates import EdmCoordinates
from ...policies.dlms import DesignerPolicy
from ...processes import EDM, RectifiedFlow
from .validation import KeptSolution

CoordinatesName = Literal["edm", "process"]


@dataclass(frozen=True)
class Coordinates:
    """A model, and the same model in the coordinates a learner works in.

    Attributes:
        model: as given.
        denoiser: what the learner calls: ``model``, or its state divided by alpha, its time the level
            sigma / alpha.
    """

    model: Denoiser
    denoiser: Denoiser
    _exact: dict[int, KeptSolution] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: Denoiser, name: CoordinatesName | None) -> Coordinates:
        """Those of the setting ``coordinates``; None is EDM's except for flows.

        Raises:
            ValueError: EDM's, and alpha is 0 at the start.
        """
        if isinstance(model.process, EDM) or name == "process":
            return cls(model, model)
        if name is None and isinstance(model.process, RectifiedFlow):
            return cls(model, model)
        return cls(model, model.in_edm_coordinates())

    def times(self, t: Tensor) -> Tensor:
        """Times of the process as times of ``denoiser``."""
        return t if self.denoiser is self.model else self.model.process.sigma_over_alpha(t)

    def policy(self, inner: AmedPolicy | DesignerPolicy) -> Any:
        """``inner``, a policy for ``denoiser``, as one for ``model``."""
        same = self.denoiser is self.model
        return inner if same else EdmCoordinates(inner, self.model.process)

    def exact_solution(self, x: Tensor, steps: int, conditions: dict[str, Any]) -> Tensor:
        """``validation.exact_solution`` from ``x``, a state of ``denoiser`` at its start."""
        exact = self._exact.setdefault(steps, KeptSolution(self.model, steps))
        if self.denoiser is self.model:
            return exact(x, **conditions)
        start, end = self._alphas()
        return exact(start * x, **conditions) / end

    def carried(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """End of the ``model`` from its start ``x``, by ``run`` from start to end of ``denoiser``."""
        if self.denoiser is self.model:
            return run(x)
        start, end = self._alphas()
        return run(x / start) * end

    def _alphas(self) -> tuple[float, float]:
        process = self.model.process
        return float(process.alpha(process.t_max)), float(process.alpha(process.t_min))

"""Fitting and replaying D-ODE corrections on traced values.

A program (``dode.programs``) writes the solver once: handed a ``Fit`` it is run on a batch and
every lambda is the closed-form least squares of one row, handed a ``Replay`` it becomes the table
for given lambdas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...models.denoiser import Denoiser, per_sample
from ...processes import Process
from ...solvers.table import Prediction
from ...solvers.trace import Form, Trace, TracedOutput
from ...support.parallel import World
from ...support.transfer import host_numbers


class Correction(NamedTuple):
    """lambda_j per direction of one row: dimensionless, and as a multiplier in the state."""

    dimensionless: tuple[float, ...]
    x: tuple[float, ...]


class FormulaRecorder(Protocol):
    """What a program runs on."""

    corrections: list[Correction]

    def start(self) -> Form: ...

    def evaluate(self, x: Form, t: Tensor) -> TracedOutput: ...

    def correct(self, base: Form, c: Tensor, output: Form, directions: Sequence[Form]) -> Form:
        """``base + c * sum_j lambda_j directions_j``; ``output`` is what ``base`` weighs by c."""
        ...


class Replay:
    """Gives the lambdas it was made with, dimensionless, one tuple per row."""

    def __init__(
        self, process: Process, store: Prediction, lambdas: Sequence[Sequence[float]]
    ) -> None:
        self.trace = Trace(process, store)
        self.corrections: list[Correction] = []
        self._lambdas = list(lambdas)

    def start(self) -> Form:
        return self.trace.start()

    def evaluate(self, x: Form, t: Tensor) -> TracedOutput:
        return self.trace.evaluate(x, t)

    def correct(self, base: Form, c: Tensor, output: Form, directions: Sequence[Form]) -> Form:
        found = self._find(base, c, output, directions)
        for value, direction in zip(found, directions, strict=True):
            base = base + direction * (c * value)
        kept = tuple(float(v) for v in found) or (0.0,)
        self.corrections.append(Correction(kept, tuple(float(v * c) for v in found) or (0.0,)))
        return base

    def _find(
        self, base: Form, c: Tensor, output: Form, directions: Sequence[Form]
    ) -> list[Tensor]:
        given = list(self._lambdas[len(self.corrections)])
        if not directions and given == [0.0]:
            return []
        if len(given) != len(directions):
            raise ValueError(f"{len(given)} lambdas for a row with {len(directions)} directions")
        return [torch.tensor(value, dtype=torch.float64, device="cpu") for value in given]


class Fit(Replay):
    """Runs the program on a batch and solves for each row's lambdas (supplement, section 5).

    lambda* = argmin ||X - y - c sum_j lambda_j w_j||^2 over the whole batch, in float64; the next
    row starts from the corrected states.

    Args:
        x: ``[B, ...]`` this rank's start states.
        targets: the teacher's states, one per evaluation, each like ``x``.
        ridge: adds ridge * ||c output||^2 to the diagonal of the normal equations.
        world: ranks that share the batch; the normal equations are summed over them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        store: Prediction,
        x: Tensor,
        targets: Sequence[Tensor],
        *,
        ridge: float = 0.0,
        chunk: int = 100,
        world: World | None = None,
        conditions: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(denoiser.process, store, [])
        self.residuals: list[tuple[float, float]] = []  # mean squares before and after
        self._denoiser = denoiser
        self._states: dict[int, Tensor] = {-1: x}
        self._outputs: list[Tensor] = []
        self._targets = targets
        self._ridge = ridge
        self._chunk = chunk
        self._world = world or World()
        self._conditions = conditions or {}

    def evaluate(self, x: Form, t: Tensor) -> TracedOutput:
        state = self.value(x)
        n = len(self._outputs)
        self._states[n] = state
        self._outputs.append(
            torch.cat(
                [
                    self._denoiser.predict(part, t, self.trace.store, **self._conditions)
                    for part in torch.split(state, self._chunk)
                ]
            )
        )
        return super().evaluate(x, t)

    def value(self, form: Form) -> Tensor:
        """``form`` on the batch, in the states' dtype."""
        terms = [(v, self._states[k]) for k, v in form.states.items()]
        terms += [(v, self._outputs[j]) for j, v in form.outputs.items()]
        total = torch.zeros_like(self._states[-1])
        for weight, tensor in terms:
            total = total + per_sample(weight, tensor) * tensor
        return total

    def _find(
        self, base: Form, c: Tensor, output: Form, directions: Sequence[Form]
    ) -> list[Tensor]:
        target = self._targets[len(self._outputs) - 1]
        residual = (target.double() - self.value(base).double()).flatten()
        columns = [float(c) * self.value(w).double().flatten() for w in directions]
        size = len(columns)
        products = [
            left @ right
            for i, left in enumerate([*columns, residual])
            for right in [*columns, residual][: i + 1]
        ]
        weighed = [float(c) * self.value(output).double()] if self._ridge else []
        numbers = host_numbers([*products, *(w.square().sum() for w in weighed)])
        sums = torch.zeros(size + 1, size + 1, dtype=torch.float64, device="cpu")
        places = torch.tril_indices(size + 1, size + 1, device="cpu")
        products_of = torch.tensor(numbers[: len(products)], dtype=torch.float64, device="cpu")
        sums[places[0], places[1]] = products_of
        sums = sums.tril() + sums.tril(-1).T
        energy = torch.tensor(
            [sum(numbers[len(products) :]), residual.numel()], dtype=torch.float64, device="cpu"
        )
        self._world.sum_(sums)
        self._world.sum_(energy)
        gram, right_side = sums[:size, :size], sums[:size, size]
        solved = _least_squares(gram, right_side, self._ridge * float(energy[0]))
        before = float(sums[size, size])
        after = before - float(2 * solved @ right_side - solved @ gram @ solved) if size else before
        self.residuals.append((before / float(energy[1]), max(after, 0.0) / float(energy[1])))
        return list(solved.unbind())


def _least_squares(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + ridge)^-1 right; 0 along directions that vanish on the batch."""
    size = len(right)
    if size == 0:
        return right
    if size == 1:
        bottom = gram[0, 0] + ridge
        return right / bottom if float(bottom) > 0 else torch.zeros_like(right)
    gram = gram + ridge * torch.eye(size, dtype=gram.dtype, device="cpu")
    inverse: Tensor = torch.linalg.pinv(gram, rtol=1e-14)
    return inverse @ right

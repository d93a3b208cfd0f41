"""What is solved: a denoiser, one sample's shape, and the condition of every sample.

Samples have numbers. A sample's noise and condition depend on its number alone, so that any split
into batches gives the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...models.denoiser import Denoiser
from ...models.wrapping import check_keywords
from ...support.transfer import host_numbers
from ...support.values import whole_number
from ..training.noise import tell_first_sample, unit_noise

Conditions = Mapping[str, Any] | Callable[[Tensor], Mapping[str, Any]] | str | Path | None
"""Keyword arguments of the network. A tensor ``[1, ...]`` serves all samples, a tensor ``[M, ...]``
gives sample i its row i mod M, inside dicts, lists and tuples, too; anything else is handed over as it
is; a callable maps the numbers of a batch (int64 ``[B]``, some more than once) to such keywords with B
rows, or lists of B entries; a path names a safetensors file of tensors. What is no row of a sample, such
as a table of positions, belongs into the network (``functools.partial``)."""


class SamplingProblem:
    """Predictions and start noise of numbered samples.

    Args:
        denoiser: the model.
        shape: of one sample.
        conditions: see ``Conditions``.
        seed: of the noise.

    Raises:
        TypeError: ``shape`` is no tuple of sizes.
        ValueError: a size is no integer of at least 1, or see ``check_conditions``.

    Attributes:
        calls: network evaluations of one sample so far (a guided one counts once).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        conditions: Conditions = None,
        *,
        seed: int = 0,
    ) -> None:
        self.denoiser = denoiser
        self.process = denoiser.process
        if not isinstance(shape, list | tuple):
            raise TypeError(f"shape is {shape!r}, expected that of one sample, such as (3, 32, 32)")
        self.shape = tuple(whole_number(size, "a size in shape") for size in shape)
        if not self.shape:
            raise ValueError("shape is (), expected at least one size: a number a sample is (1,)")
        self.seed = seed
        self.device = denoiser.device
        self.conditions = conditions_on(read_conditions(conditions), self.device)
        check_conditions(denoiser, self.conditions)
        self.calls = 0
        self._scale = float(self.process.sigma(self.process.t_max))

    def noise(self, numbers: range) -> Tensor:
        """Start states ``[B, *shape]``, float32, on the network's device."""
        return self._scale * unit_noise(self.seed, numbers, self.shape).to(self.device)

    def condition(self, numbers: Sequence[int], copies: int = 1) -> dict[str, Any]:
        """The network's keyword arguments for these samples, repeated ``copies`` times."""
        return rows_of(self.conditions, numbers, copies)

    def predict(
        self, x: Tensor, t: Tensor, numbers: range, prediction: Literal["data", "noise"] = "data"
    ) -> Tensor:
        """E[x0 | x] (or E[z | x]) for copies of the samples ``numbers``, one copy after the other.

        Args:
            x: ``[copies * len(numbers), ...]``. t: float64, ``[]`` or like ``x`` in its first size.
        """
        self.calls += len(x)
        copies = len(x) // len(numbers)
        if hasattr(self.denoiser, "first_sample"):  # its conditions follow the batch's first number
            parts, conditions = [], self.condition(numbers)
            for part, times in zip(x.chunk(copies), t.expand(len(x)).chunk(copies), strict=True):
                tell_first_sample(self.denoiser, numbers.start)
                parts.append(self.denoiser.predict(part, times, prediction, **conditions))
            return torch.cat(parts)
        return self.denoiser.predict(x, t, prediction, **self.condition(numbers, copies))

    def evaluation(self, samples: int) -> Callable[[], None]:
        """Evaluates that many samples at their start and waits for the device: to be timed."""
        numbers = range(samples)
        x = self.noise(numbers)
        t = torch.full((samples,), self.process.t_max, dtype=torch.float64, device=x.device)

        @torch.no_grad()
        def evaluate() -> None:
            host_numbers([self.predict(x, t, numbers).sum()])

        return evaluate


def check_conditions(denoiser: Denoiser, conditions: Any) -> None:
    """Raises for conditions (on their device) that the denoiser's network cannot be called with.

    A callable's are seen only in a run, and a denoiser of another class may give its network more.

    Raises:
        ValueError: a tensor without rows, or see ``models.wrapping.check_keywords``.
    """
    if callable(conditions):
        return
    for name, value in (conditions or {}).items():
        if isinstance(value, Tensor) and value.ndim and len(value) == 0:
            raise ValueError(
                f"conditions have {name} {list(value.shape)}, expected a row a sample, or one for all"
            )
    if type(denoiser) is Denoiser:
        check_keywords(denoiser.network, conditions or {})


def read_conditions(conditions: Conditions) -> Any:
    """``conditions`` with a file read.

    Raises:
        TypeError: they are none of ``Conditions``.
        ValueError: the file is no safetensors file of tensors, or has none; a name is taken.
    """
    if not isinstance(conditions, str | Path):
        if not (conditions is None or callable(conditions) or isinstance(conditions, Mapping)):
            raise TypeError(
                f"conditions are {type(conditions).__name__}, expected keywords of the network such as "
                "{'label': tensor}, a function from sample numbers to them, or a safetensors file"
            )
        return _not_reserved(conditions)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(str(conditions))
    except SafetensorError as error:
        raise ValueError(
            f"conditions: {conditions} is not a safetensors file of tensors: {error}"
        ) from error
    if not loaded:
        raise ValueError(f"conditions: {conditions} holds no tensors")
    return _not_reserved(loaded)


_RESERVED = frozenset(
    ("x", "t", "prediction", "noise", "callback", "progress", "return_trajectory",
     "network_input", "c_noise")
)  # fmt: skip
"""Arguments that denoisers and samplers have themselves."""


def _not_reserved(conditions: Any) -> Any:
    taken = sorted(_RESERVED.intersection(conditions)) if isinstance(conditions, Mapping) else []
    if taken:
        raise ValueError(
            f"conditions have {taken}, which denoisers or samplers take themselves: give the network a "
            "function around it that takes them by other names"
        )
    return conditions


def conditions_on(conditions: Any, device: torch.device) -> Any:
    """``conditions`` (no file) with tensors on ``device``: given ones once, a callable's each time."""

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(each_tensor(values, lambda tensor: tensor.to(device)))

    if not callable(conditions):
        return moved(conditions) if conditions else conditions
    return lambda numbers: moved(conditions(numbers))


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed, inside dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_tensor(held, change) for key, held in value.items()}
    if isinstance(value, list | tuple):
        parts = [each_tensor(held, change) for held in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def vary(conditions: Mapping[str, Any]) -> bool:
    """Whether some tensor has more than one row."""
    rows: list[int] = []

    def counted(tensor: Tensor) -> Tensor:
        rows.append(len(tensor) if tensor.ndim else 1)
        return tensor

    each_tensor(conditions, counted)
    return max(rows, default=1) > 1


def rows_of(conditions: Any, numbers: Sequence[int], copies: int = 1) -> dict[str, Any]:
    """Keyword arguments for the samples ``numbers``, repeated ``copies`` times.

    Raises:
        ValueError: a callable, and a number beyond int64.
    """
    if conditions is None:
        return {}
    if callable(conditions):
        if max(numbers, default=0) >= 1 << 63:
            raise ValueError(
                f"sample {max(numbers)} is beyond int64, which conditions from a callable need"
            )
        # With the copies' numbers, too: a list of an entry a sample, such as prompts, cannot be repeated
        # here, where it looks like one of tensors with a row a sample.
        return dict(conditions(torch.tensor(list(numbers) * copies, device="cpu")))
    return dict(each_tensor(conditions, lambda tensor: _rows(tensor, numbers, copies)))


def _rows(value: Tensor, numbers: Sequence[int], copies: int) -> Tensor:
    if value.ndim == 0:
        return value
    if len(value) == 0:
        raise ValueError(f"a condition has shape {list(value.shape)}, expected a row or more")
    if len(value) == 1:
        return value.expand(len(numbers) * copies, *value.shape[1:])
    rows = torch.tensor([number % len(value) for number in numbers], device=value.device)
    return _repeated(value[rows], copies)


def _repeated(value: Tensor, copies: int) -> Tensor:
    if copies == 1 or value.ndim == 0:
        return value
    return value.repeat(copies, *([1] * (value.ndim - 1)))

"""The engine's solvers with k-diffusion's sampler signature (also ComfyUI's and A1111's).

    from dlms_engine.integrations.k_diffusion import get_sigmas_dlms, sample_dlms

    sigmas = get_sigmas_dlms(6, sigma_min, sigma_max)
    x = sample_dlms(model, torch.randn_like(x) * sigmas[0], sigmas, solver="dpm_solver_pp")

``model(x, sigma [B], **extra_args)`` returns E[x0 | x]. The state is x0 + sigma z, or
(1 - sigma) x0 + sigma z for flow models, whose half log-SNR is log((1 - sigma) / sigma).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.denoiser import Denoiser
from ..policies.corrector import CorrectedPolicy, Corrector, Correctors
from ..processes import EDM, Process, RectifiedFlow
from ..solvers.policy import Policy, policy_of
from .scheduler import tables
from .scheduler.noise import NoiseModel
from .scheduler.plan import Rows, late_start, make_plan, policy_rows, table_rows
from .scheduler.source import load_source
from .scheduler.spread import spread
from .scheduler.state import State

_log = logging.getLogger("dlms_engine")
Schedule = Literal["karras", "exponential", "uniform", "shifted"]


@torch.no_grad()
def sample_dlms(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    solver: Any = "dpm_solver_pp",
    solver_order: int | None = None,
    solver_options: dict[str, Any] | None = None,
    flow: bool | None = None,
) -> Tensor:
    """Samples from ``x`` ``[B, ...]`` at ``sigmas[0]`` to ``sigmas[-1]``.

    Args:
        model: denoiser, called once a row with ``sigma`` ``[B]``.
        sigmas: ``[N + 1]`` decreasing; its values are read once, before the loop.
        callback: called before each step with ``x``, ``i``, ``sigma``, ``sigma_hat``, ``denoised``.
        disable: hides the progress bar.
        solver: a name, a solver file's path, a table, or a learned solver. A learned solver's own
            sigmas must be given (``get_sigmas_dlms(solver=...)``), or their end for a late start.
        flow: whether ``model`` is a flow model; None asks its ``model_sampling``.

    Returns:
        ``[B, ...]`` in ``x``'s dtype; state and history are float32.

    Raises:
        ValueError: sigmas that do not decrease, or are not the learned solver's.
    """
    if _rising(sigmas):
        return _unsampled(model, x, sigmas, extra_args or {}, callback, disable)
    levels = _levels(sigmas)
    flow = samples_a_flow(model) if flow is None else flow
    noise_model = _noise_model(levels, flow)
    source = load_source(solver)
    begin, correctors = 0, None
    if isinstance(source, str):
        rows = _named(source, noise_model.process, levels, solver_order, solver_options)
    else:
        rows, begin, correctors = _learned(source, flow, levels)
    plan = make_plan(rows, noise_model, begin)
    state = State(plan, correctors)
    ones = x.new_ones(x.shape[0])
    asked = rows.times.to(device=x.device, dtype=x.dtype)
    scale = plan.c_in[begin]
    for i in tqdm(range(rows.count - begin), disable=disable):
        n = begin + i
        sigma = asked[n]
        denoised = model(x if i or scale == 1.0 else x * scale, sigma * ones, **(extra_args or {}))
        if callback is not None:
            # ``sigma`` is a view of a tensor made before the loop: nothing is read here
            # ``i`` counts the schedule's steps: two-evaluation solvers have more rows than those
            step = i * (len(levels) - 1) // (rows.count - begin)
            callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = state.advance(n, denoised, x)
    return x


def _rising(sigmas: Tensor) -> bool:
    """Whether a schedule goes from data to noise, as a flipped one does."""
    return len(sigmas) > 1 and bool((sigmas.detach().cpu().diff() > 0).all())


def _unsampled(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], Any] | None,
    disable: bool | None,
) -> Tensor:
    """Euler's method from data to noise: multistep tables are made for falling levels only."""
    _log.info("the sigmas rise: Euler's method runs, whatever the solver")
    ones = x.new_ones(x.shape[0])
    levels = sigmas.to(device=x.device, dtype=torch.float64)
    tiny = 1e-4 * float(levels[-1])
    for i in tqdm(range(len(levels) - 1), disable=disable):
        sigma, following = levels[i].clamp(min=tiny), levels[i + 1]
        denoised = model(x, sigma.to(x.dtype) * ones, **extra_args)
        if callback is not None:
            level = sigma.to(x.dtype)
            callback({"x": x, "i": i, "sigma": level, "sigma_hat": level, "denoised": denoised})
        ratio = (following / sigma).to(x.dtype)
        x = ratio * x + (1 - ratio) * denoised
    return x


def get_sigmas_dlms(
    n: int | None = None,
    sigma_min: float = 0.03,
    sigma_max: float = 14.6,
    *,
    schedule: Schedule = "karras",
    rho: float = 7.0,
    shift: float = 3.0,
    solver: Any = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``[n + 1]`` float32 sigmas ending at 0; a learned solver's own with ``solver``.

    Args:
        schedule: ``"karras"`` and ``"exponential"`` span sigma_max .. sigma_min; ``"uniform"`` and
            ``"shifted"`` are a flow's, from sigma_max (at most 1) to 0, moved by ``shift``.

    Raises:
        ValueError: n is missing or does not fit the solver, unknown schedule, a range out of order.
    """
    if solver is not None:
        found = solver_sigmas(solver)
        if n is not None and n != len(found) - 1:
            raise ValueError(f"n is {n}, but the solver has {len(found) - 1} steps")
        return found.to(device=device, dtype=torch.float32)
    if n is None or n < 1:
        raise ValueError(f"n is {n}, expected an integer >= 1")
    if schedule in ("uniform", "shifted"):
        high = min(sigma_max, 1.0)
        u = high * torch.arange(n, 0, -1, dtype=torch.float64) / n
        sigmas = u if schedule == "uniform" else shift * u / (1 + (shift - 1) * u)
    elif schedule in ("karras", "exponential"):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min is {sigma_min}, sigma_max is {sigma_max}, expected 0 < min < max"
            )
        sigmas = spread(f"{schedule}_sigmas", sigma_max, sigma_min, n, {"rho": rho})
    else:
        raise ValueError(
            f"schedule is {schedule!r}, expected 'karras', 'exponential', 'uniform' or 'shifted'"
        )
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device=device, dtype=torch.float32)


def solver_sigmas(solver: Any) -> Tensor:
    """``[rows + 1]`` float64 noise levels of a learned solver's states."""
    source = load_source(solver)
    if isinstance(source, str):
        raise ValueError(f"solver {source!r} has no sigmas of its own: use a schedule")
    policy = policy_of(source)
    process: Process = policy.process
    levels = _rows_of(policy).levels
    return levels if isinstance(process, RectifiedFlow) else process.sigma_over_alpha(levels)


def samples_a_flow(model: Any) -> bool:
    """Whether a wrapped model's ``model_sampling`` is a flow's (``CONST`` in its classes)."""
    seen: Any = model
    for _ in range(4):
        sampling = getattr(seen, "model_sampling", None)
        if sampling is not None:
            return any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)
        seen = getattr(seen, "inner_model", None)
    return False


def _levels(sigmas: Tensor) -> Tensor:
    levels = sigmas.detach().to(device="cpu", dtype=torch.float64)
    if levels.ndim != 1 or len(levels) < 2 or not bool((levels.diff() < 0).all()):
        raise ValueError(
            f"sigmas are {levels.tolist()}, expected [N + 1] decreasing values, N >= 1"
        )
    return levels


def _noise_model(levels: Tensor, flow: bool) -> NoiseModel:
    if flow and float(levels[0]) > 1:
        raise ValueError(f"sigmas start at {float(levels[0])}, a flow model's are at most 1")
    lowest = float(levels[levels > 0][-1])
    process = (
        RectifiedFlow() if flow else EDM(min(lowest, 0.5 * float(levels[0])), float(levels[0]))
    )
    return NoiseModel("flow" if flow else "edm", process, 1, Denoiser(_never, process, "data"))


def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("the denoiser is called by the loop")


def _named(
    name: str, process: Process, levels: Tensor, order: int | None, extra: dict[str, Any] | None
) -> Rows:
    # float32 sigmas near 1 would leave a flow an alpha of rounding errors
    if isinstance(process, RectifiedFlow) and float(levels[0]) > 1 - 1e-6:
        levels = torch.cat([torch.ones(1, dtype=torch.float64), levels[1:]])
    # the first part of a split schedule does not end here: its order stays
    ends = float(levels[-1]) == 0
    options = tables.solver_options(name, order, ends, extra, len(levels) - 1)
    return table_rows(tables.named_table(name, process, levels, options))


def _rows_of(policy: Policy) -> Rows:
    table = policy.static_table()
    if table is not None:
        return table_rows(table)
    if policy.needs_features:
        raise ValueError(
            "this solver computes its rows from the network's bottleneck, which a sampler function "
            "does not see: use its static table, solver.table(denoiser, noise)"
        )
    return policy_rows(policy)


class _OverAlpha(Correctors):
    """Correctors of a state that is carried divided by alpha ``[rows]``."""

    def __init__(self, correctors: Correctors, alpha: Tensor) -> None:
        super().__init__([cast(Corrector, part) for part in correctors.parts], len(alpha))
        self._alpha: list[float] = alpha.tolist()

    def forward(self, n: int, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return super().forward(n, x * self._alpha[n], outputs) / self._alpha[n]


def _learned(source: Any, flow: bool, levels: Tensor) -> tuple[Rows, int, Correctors | None]:
    """The solver in this model's state space: rows, the row to begin with, what follows them."""
    policy = policy_of(source)
    correctors: Correctors | None = None
    if isinstance(policy, CorrectedPolicy):
        correctors, policy = policy.correctors, policy.rows
    process: Process = policy.process
    if flow != isinstance(process, RectifiedFlow):
        raise ValueError(f"the solver was made for {process!r}, the model is flow={flow}")
    rows, own = _rows_of(policy), solver_sigmas(source)
    if correctors is not None and not flow:
        correctors = _OverAlpha(correctors, process.alpha(rows.levels[1:]))
    begin = len(own) - len(levels)
    if begin < 0 or not torch.allclose(own[begin:], levels, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"sigmas are {levels.tolist()}, the solver's are {own.tolist()}: pass "
            "get_sigmas_dlms(solver=...), or the end of it"
        )
    if not flow:
        rows = _exploding(rows, process)
    if not begin:
        return rows, 0, correctors
    if correctors is not None:
        _log.warning("the run begins at step %d: the solver's correctors are left out", begin)
    return late_start(rows, begin), begin, None


def _exploding(rows: Rows, process: Process) -> Rows:
    """Rows for x / alpha, the state these samplers carry; predictions are the same in both."""
    before = process.alpha(rows.times)
    end = rows.levels[-1:]
    after = torch.cat([before[1:], process.alpha(end)])
    steps = torch.stack([rows.times[1:], rows.levels[1:-1]]) if rows.count > 1 else None
    if steps is not None and not torch.allclose(steps[0], steps[1], rtol=1e-9):
        raise ValueError(
            "the solver calls the network at other times than the state's, which a denoiser that "
            "scales its own input cannot be given: use Sampler, DLMSScheduler or accelerate"
        )
    scale = rows.scale * float(process.alpha(rows.levels[0]) / before[0])
    return Rows(
        a=rows.a * before / after,
        b=rows.b / after[:, None],
        times=process.sigma_over_alpha(rows.times),
        levels=process.sigma_over_alpha(rows.levels),
        scale=scale,
        prediction=rows.prediction,
    )

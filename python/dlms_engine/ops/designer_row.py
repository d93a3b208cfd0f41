"""A designer's row as one operator: what goes in and out, and which implementations there are.

``start`` gives the numbers of the first evaluation, ``row`` those of update n and of evaluation
n + 1, for every sample. What is carried between them is ``state``, float64 ``[B, 5 + order]``:

column     meaning
0          t, where the next step starts
1, 2, 3    c_skip, c_out and c_in of the evaluation to come
4          weight of the noise in x (before row 0: of x itself, the initial scale)
5 + k      weight of m_{n-1-k} in x_n, kept where the analytical output must be written through x

The operations they stand for are those of ``policies/dlms.py``; ``engine/dlms_steps.py`` decides which
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, layout

STATE = 5
CONSTANTS = 11
"""float64: time_range, scale_range, time_gain, unused, four rates, three of the process."""

PROCESS_CODES = ("edm", "vp", "rectified_flow", "cosine", "vp_discrete")
NETWORK_CODES = ("edm", "data", "noise", "velocity", "flow", "reverse_flow")
LEVELS = ("log", "time", "index")
"""What c_noise is: ln(sigma / alpha) / 4, the time, or the level's index of a discrete process."""


class RowConfig(NamedTuple):
    """Everything a kernel is specialised for, as integers; places in the tuples above."""

    steps: int
    order: int
    depth: int
    afs: int
    log: int  # times are fractions of what remains of log t
    frozen: int  # times stay those of the grid
    process: int
    noise: int  # the ring stores noise predictions
    network: int
    level: int


class Parameters(NamedTuple):
    """Tensors of a designer, in the order in which the operators take them.

    w1 .. b2 are the encoder's (any tensors without features); table is log alpha of a discrete
    process at its knots (any float64 tensor elsewhere).
    """

    w1: Tensor  # [128, F]
    b1: Tensor  # [128]
    w2: Tensor  # [4, 128]
    b2: Tensor  # [4]
    time_w: Tensor  # [8, 8]
    time_b: Tensor  # [8]
    index_w: Tensor  # [steps, 8]
    head: Tensor  # [order + 2, 20]
    bias: Tensor  # [steps, order + 2]
    grid: Tensor  # [steps + 1] float64, as all that follow
    weights: Tensor  # [steps, order]
    logits: Tensor  # [steps - 1]
    constants: Tensor  # [CONSTANTS]
    table: Tensor
    guidance: Tensor  # []
    sigma_data: Tensor  # []


def kernel_constants(bounds: Sequence[float], process: Mapping[str, Any]) -> Tensor:
    """``[CONSTANTS]`` on the CPU, of (time_range, scale_range, time_gain) and a process's config."""
    own: list[float] = []
    if process["name"] == "vp":
        own = [process["beta_d"], process["beta_min"]]
    elif process["name"] == "cosine":
        rate = math.pi / 2 / (1 + process["s"])
        own = [rate, rate * process["s"], math.cos(rate * process["s"])]
    elif process["name"] == "vp_discrete":
        own = [float(len(process.get("betas") or process["alphas_cumprod"]))]
    rates = [1e4 ** -(k / 3) for k in range(4)]
    numbers = [*bounds, 0.0, *rates, *own, 0.0, 0.0, 0.0]
    return torch.tensor(numbers[:CONSTANTS], dtype=torch.float64, device="cpu")


class Kernels(NamedTuple):
    """One implementation.

    start(parameters, config, batch, dtype, noise_dtype) -> (state, c_in [B], c_noise [B])
    row(features [B, F] | None, state, parameters, config, n, dtype, noise_dtype)
        -> (next state, row [B, 6 + depth], c_noise [B])

    ``dtype`` is the rows' and c_in's, ``noise_dtype`` that of c_noise. Nothing is written in place,
    nothing is read on the host, and a sample's bits do not depend on its batch.
    """

    start: Callable[..., tuple[Tensor, Tensor, Tensor]]
    row: Callable[..., tuple[Tensor, Tensor, Tensor]]
    device_types: tuple[str, ...]


_held: list[Kernels] = []


def register_designer(kernels: Kernels) -> None:
    """Make ``kernels`` the implementation, in place of one registered before."""
    _held[:] = [kernels]


def refuse(exc: BaseException) -> None:
    """Goes on with torch operations, as the kernels cannot be built here; says so."""
    _held.clear()
    reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    backends.log.warning("rows of DLMS in torch operations: Triton does not build (%s)", reason)


def select_designer(backend: str, device: torch.device) -> Kernels | None:
    """The kernels for tensors on ``device`` beside fused rows of ``backend``, or None.

    ``"eager"`` and ``"cpu"`` stay with torch operations.
    """
    if backend not in ("cuda", "triton") or not _held or device.type not in _held[0].device_types:
        return None
    return _held[0]


def check_designer(
    features: Tensor | None, state: Tensor, parameters: Sequence[Tensor], n: int
) -> None:
    """ValueError unless shapes and dtypes are those of ``row``'s arguments."""
    given = Parameters(*parameters)
    order = given.weights.shape[1]
    if state.dim() != 2 or state.shape[1] != STATE + order or state.dtype != torch.float64:
        raise ValueError(
            f"state is {state.dtype} {tuple(state.shape)}, expected float64 [B, {STATE + order}]"
        )
    if n < 0:
        raise ValueError(f"n is {n}, expected an evaluation, 0 or more")
    if features is None:
        return
    length = given.w1.shape[1]
    if features.shape != (state.shape[0], length):
        raise ValueError(
            f"features are {tuple(features.shape)}, expected {(state.shape[0], length)}: the designer "
            f"was made for a bottleneck of {length} numbers"
        )


def outputs(
    batch: int, config: RowConfig, row: bool, like: Tensor, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors (state, row or c_in, c_noise) on the device of ``like``, not filled."""
    width: Any = (batch, layout.row_width(config.depth)) if row else (batch,)
    state = like.new_empty((batch, STATE + config.order), dtype=torch.float64)
    return state, like.new_empty(width, dtype=dtypes[0]), like.new_empty((batch,), dtype=dtypes[1])

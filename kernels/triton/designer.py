"""The designer's row as operators `dlms_triton::designer_start` and `designer_row`.

Arguments and results are those of `ops/designer_row.py`. As in `operators`, they are
`triton_op`s on a GPU and `custom_op`s under the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dlms_engine.kernels import interpreted
from dlms_engine.kernels.triton import designer_device as device
from dlms_engine.kernels.triton.launch import _on, _programs
from dlms_engine.kernels.triton.operators import _operator, _wrap
from torch import Tensor

from dlms_engine.ops import designer_row as spec

HIDDEN = 128
CHUNK = 32
NUM_WARPS = 4


@_operator("designer_start")  # type: ignore[untyped-decorator]
def designer_start(
    parameters: Sequence[Tensor],
    config: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(state, c_in, c_noise) of the first evaluation."""
    made = spec.RowConfig(*config)
    out = spec.outputs(batch, made, False, parameters[-1], (dtype, noise_dtype))
    _launch(None, out[0], parameters, out, 0, made, start=True)
    return out


@_operator("designer_row")  # type: ignore[untyped-decorator]
def designer_row(
    features: Tensor | None,
    state: Tensor,
    parameters: Sequence[Tensor],
    config: Sequence[int],
    n: int,
    dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(next state, row, c_noise) after evaluation n."""
    spec.check_designer(features, state, parameters, n)
    made = spec.RowConfig(*config)
    out = spec.outputs(state.shape[0], made, True, state, (dtype, noise_dtype))
    features = None if features is None else features.contiguous()
    _launch(features, state.contiguous(), parameters, out, n, made, start=False)
    return out


def _launch(
    features: Tensor | None,
    state: Tensor,
    parameters: Sequence[Tensor],
    out: tuple[Tensor, Tensor, Tensor],
    n: int,
    config: spec.RowConfig,
    *,
    start: bool,
) -> None:
    batch = state.shape[0]
    if batch == 0:
        return
    lanes = 8
    while lanes < config.order + 2 or lanes < config.depth:
        lanes *= 2
    with _on(state):
        _wrap(device.designer_row_kernel)[(_programs(batch),)](
            state if features is None else features,
            state,
            *(t.contiguous() for t in parameters),
            *out,
            n,
            START=start,
            STEPS=config.steps,
            ORDER=config.order,
            DEPTH=config.depth,
            AFS=config.afs,
            FEATURES=0 if features is None else features.shape[1],
            LOG=config.log,
            FROZEN=config.frozen,
            PROCESS=config.process,
            NOISE=config.noise,
            NETWORK=config.network,
            LEVEL=config.level,
            LANES=lanes,
            HIDDEN=HIDDEN,
            CHUNK=CHUNK,
            num_warps=NUM_WARPS,
        )


def _fake_start(
    parameters: Sequence[Tensor],
    config: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    made = spec.RowConfig(*config)
    return spec.outputs(batch, made, False, parameters[-1], (dtype, noise_dtype))


def _fake_row(
    features: Tensor | None,
    state: Tensor,
    parameters: Sequence[Tensor],
    config: Sequence[int],
    n: int,
    dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    spec.check_designer(features, state, parameters, n)
    made = spec.RowConfig(*config)
    return spec.outputs(state.shape[0], made, True, state, (dtype, noise_dtype))


if interpreted():
    designer_start.register_fake(_fake_start)
    designer_row.register_fake(_fake_row)
KERNELS = spec.Kernels(
    start=designer_start,
    row=designer_row,
    device_types=("cuda", "cpu") if interpreted() else ("cuda",),
)

"""Steps of a DLMS policy whose rows one kernel computes (``ops/designer_row.py``).

The torch operations of ``policies/dlms.py`` are the meaning; they are small and wait for one another,
33 to 83 graph nodes a row on a GPU. Here a row is one node, beside the mean of the bottleneck.
"""

from __future__ import annotations

import subprocess
from typing import Any

import torch
from torch import Tensor

from ..models.denoiser import Denoiser
from ..ops import designer_row
from ..ops.designer_row import LEVELS, NETWORK_CODES, PROCESS_CODES, Kernels, Parameters, RowConfig
from ..policies.dlms import DesignerPolicy
from ..processes import EDM, VP, Cosine, RectifiedFlow
from ..processes.base import Process
from ..processes.discrete import VPDiscrete
from .steps import NetworkOutput, PolicySteps, Steps, evaluate, guidance

BUILD_ERRORS = (RuntimeError, OSError, ImportError, subprocess.CalledProcessError)
_KINDS: tuple[type[Process], ...] = (EDM, VP, RectifiedFlow, Cosine, VPDiscrete)  # as PROCESSES


class DesignerSteps:
    """The two halves of a step (see ``engine/steps.py``) on the kernels of one implementation.

    Args:
        kernels: from ``designer_row.select_designer``.
        x: ``[B, ...]``: batch and device of the run.
        dtype: of state, history and rows.
        conditions: handed to the network.
    """

    rows: Tensor | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        policy: DesignerPolicy,
        kernels: Kernels,
        x: Tensor,
        dtype: torch.dtype,
        conditions: dict[str, Any],
    ) -> None:
        self.count = policy.nfe
        self.depth = policy.depth
        self._denoiser = denoiser
        self._kernels = kernels
        self._conditions = conditions
        self._custom_level = denoiser._time_input is not None
        self._parameters = parameters(denoiser, policy, x.device)
        self._config = row_config(denoiser, policy)
        wide = torch.float64 in (dtype, denoiser.network_dtype) or self._custom_level
        self._dtypes = (dtype, torch.float64 if wide else torch.float32)
        self._features = policy.designer.settings.features > 0 and denoiser.features is not None
        started = kernels.start(self._parameters, self._config, x.shape[0], *self._dtypes)
        self._state, self.c_in, self._c_noise = started

    def evaluate(self, n: int, network_input: Tensor) -> NetworkOutput:
        level = self._c_noise
        if self._custom_level:
            level = self._denoiser._noise_level(level)
        return evaluate(self._denoiser, network_input, level, self._conditions)

    def row(self, n: int) -> Tensor:
        features = self._denoiser.last_features if self._features else None
        self._state, row, self._c_noise = self._kernels.row(
            features, self._state, self._parameters, self._config, n, *self._dtypes
        )
        return row


def policy_steps(
    denoiser: Denoiser,
    policy: Any,
    x: Tensor,
    dtype: torch.dtype,
    conditions: dict[str, Any],
    backend: str,
) -> Steps:
    """Steps of ``policy``: with the kernel where it is available and does the same, else in torch."""
    kernels = designer_row.select_designer(backend, x.device)
    if kernels is not None and _usual(denoiser) and takes(policy):
        policy.place(x.device)
        try:
            return DesignerSteps(denoiser, policy, kernels, x, dtype, conditions)
        except BUILD_ERRORS as exc:
            # Triton needs a C compiler, the CUDA kernels beside it do not.
            asked = backend == "triton" or torch.compiler.is_compiling()
            if asked or isinstance(exc, torch.OutOfMemoryError):
                raise
            designer_row.refuse(exc)
    return PolicySteps(denoiser, policy, policy.start(x.shape[0], x.device), dtype, conditions)


def _usual(denoiser: Denoiser) -> bool:
    """Whether its coefficients are those that the kernel computes: no subclass has others."""
    kind = type(denoiser)
    return (
        denoiser.network_process is denoiser.process
        and kind.preconditioning is Denoiser.preconditioning
        and kind._noise_level is Denoiser._noise_level
    )


def takes(policy: Any) -> bool:
    """Whether the kernel computes what ``policy`` would.

    Not under autograd, not while exporting (a package holds plain torch operations), and not for
    policies that decide otherwise (subclasses, ``policies.static_table.deciding``).
    """
    if type(policy) is not DesignerPolicy or exporting():
        return False
    if "decide" in vars(policy):
        return False
    designer = policy.designer
    held = list(designer.parameters())
    if torch.is_grad_enabled() and any(p.requires_grad for p in held):
        return False
    dtype = designer.bias.dtype
    return (
        type(policy.process) in _KINDS
        and designer.settings.nfe > 0
        and dtype in (torch.float32, torch.float64)
        and all(p.dtype == dtype for p in held)
        and designer.grid.dtype == torch.float64
    )


def exporting() -> bool:
    """Whether ``torch.export`` is tracing.

    Not ``torch.compiler.is_exporting()``: inside ``torch.compile``, Dynamo of torch 2.11 replaces that
    call by True. The flag behind it is right in both versions, strict or not.
    """
    return bool(torch.compiler._is_exporting_flag)


def row_config(denoiser: Denoiser, policy: DesignerPolicy) -> RowConfig:
    """What the kernel is specialised for."""
    settings, process = policy.designer.settings, policy.process
    level = "log" if denoiser.prediction == "edm" else "time"
    if isinstance(process, VPDiscrete) and denoiser.prediction not in ("edm", "data"):
        level = "index"
    if denoiser._time_input is not None:
        level = "time"
    return RowConfig(
        steps=settings.steps,
        order=settings.order,
        depth=policy.depth,
        afs=int(settings.afs),
        log=int(settings.coordinate == "log"),
        frozen=int(settings.time_range == 0),
        process=PROCESS_CODES.index(process.name),
        noise=int(settings.prediction == "noise"),
        network=NETWORK_CODES.index(denoiser.prediction),
        level=LEVELS.index(level),
    )


def parameters(denoiser: Denoiser, policy: DesignerPolicy, device: torch.device) -> Parameters:
    """The designer's tensors as they are now; guidance and sigma_data are filled on the device."""
    designer, process = policy.designer, policy.process
    grid = designer.grid
    named = dict(designer.named_parameters())
    table = process._levels_on(device) if isinstance(process, VPDiscrete) else grid
    return Parameters(
        w1=named.get("encoder.0.weight", designer.bias),  # not read without features, as all four
        b1=named.get("encoder.0.bias", designer.bias),
        w2=named.get("encoder.2.weight", designer.bias),
        b2=named.get("encoder.2.bias", designer.bias),
        time_w=named["time.0.weight"],
        time_b=named["time.0.bias"],
        index_w=designer.index.weight,
        head=designer.head.weight,
        bias=designer.bias,
        grid=grid,
        weights=designer.init_weights,
        logits=designer.init_logits,
        constants=designer.constants,
        table=table,
        guidance=grid.new_full((), guidance(denoiser)),
        sigma_data=grid.new_full((), denoiser.sigma_data),
    )

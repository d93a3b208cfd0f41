"""A whole sampler as one AOTInductor package, which runs without this library and without Python.

``export_sampler`` traces network and rows of every evaluation with ``torch.export`` and compiles the
result. The rows are written in plain torch operations there (``ops.reference.advance``, the meaning
of the fused row) and the history is no ring but the tensors themselves, so nothing of ``dlms::`` is
left in the graph and Inductor fuses each row with what stands around it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from .._version import __version__
from ..ops import layout, reference
from ..policies.run import run_predictions
from ..support.files import replacing, require_writable
from ..support.renamed import one_of_two
from .export_reasons import explain_export, suggested_batch
from .sampler import Sampler
from .steps import TableRows, first_input

METADATA = "dlms_engine"
"""Key of the package's metadata: a JSON object that says what was exported."""


LARGEST_BATCH = 4096
"""Of a package whose batch is free, unless the network sets a lower bound."""


class SamplerExportError(RuntimeError):
    """The sampler cannot be exported or compiled; the message says why and what to do.

    ``max_batch``: the largest batch that one program could serve, if that is what stood in the way.
    """

    def __init__(self, what: str, exc: BaseException) -> None:
        super().__init__(f"{what}: {explain_export(exc)}")
        self.max_batch = suggested_batch(exc)


class SamplerModule(nn.Module):
    """A sampler as a function without state: ``forward(noise, conditions)``, every row unrolled.

    Args:
        sampler: a sampler of a table or of a policy whose rows are tensor operations (DLMS, AMED).
        device: where it will run.
        fixed: arguments of the network that are no tensors; they become part of the graph.
    """

    rows: Tensor
    c_noise: Tensor
    c_in: Tensor

    def __init__(
        self, sampler: Sampler, device: torch.device, fixed: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.sampler = sampler
        self.fixed = dict(fixed or {})
        self._read: list[list[bool]] | None = None
        table = sampler.policy.static_table()
        if table is not None:
            for name, value in sampler._plan(device)._asdict().items():
                self.register_buffer(name, value)
            weights = self.rows[..., layout.B :].reshape(sampler.nfe, -1, table.depth)
            self._read = (weights != 0).any(1).tolist()
        else:
            sampler.policy.start(1, device)  # moves the policy's networks there, once
        if sampler.correctors is not None:
            sampler._placed_correctors(device)
            self.add_module("correctors", sampler.correctors)
        # A policy is no module: its networks are registered here, to be parameters of the graph.
        for name, value in vars(sampler.policy).items():
            if isinstance(value, nn.Module):
                self.add_module(f"policy_{name}", value)

    def forward(self, noise: Tensor, conditions: dict[str, Any] | None = None) -> Tensor:
        """The sample ``[B, ...]`` in the state dtype, from ``noise`` ``[B, ...]``."""
        sampler, given = self.sampler, {**self.fixed, **(conditions or {})}
        x = noise.to(sampler.dtype)
        if sampler.denoiser.dynamic_thresholding is not None:
            correctors = sampler.correctors
            return run_predictions(sampler.denoiser, sampler.policy, x, given, None, correctors)
        plan = None if self._read is None else TableRows(self.rows, self.c_noise, self.c_in)
        steps = sampler._steps(x, given, plan)
        network_input = first_input(x, steps.c_in, sampler._network_dtype(x))
        history: list[Tensor] = []
        for n in range(steps.count):
            out = steps.evaluate(n, network_input)
            f, f_cond = (out, None) if isinstance(out, Tensor) else out
            older = history[: steps.depth - 1]
            past = [m if self._reads(n, k) else None for k, m in enumerate(older, 1)]
            row = steps.row(n)
            x, m, network_input = reference.advance(f, f_cond, x, past, row)
            history = [m, *history][: steps.depth]
            if sampler.correctors is not None and n >= sampler.correctors.first:
                x = sampler.correctors(n, x, history)
                network_input = first_input(x, row[..., layout.C_IN], network_input.dtype)
        return x

    def _reads(self, n: int, k: int) -> bool:
        """Whether row ``n`` weighs m_{n-k}; a table says so beforehand."""
        return self._read is None or self._read[n][k]


def trace_sampler(
    sampler: Sampler,
    noise: Tensor,
    *,
    conditions: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    max_batch: int | None = None,
) -> ExportedProgram:
    """The sampler as an ``ExportedProgram`` of aten operations; see ``export_sampler``."""
    tensors, fixed = split_conditions(conditions)
    table = sampler.policy.static_table()
    batched = table is not None and bool(table.batch_shape)
    _check(noise, dynamic_batch, max_batch, batched)
    module = SamplerModule(sampler, noise.device, fixed)
    try:
        return _export(module, noise, tensors, dynamic_batch, max_batch or LARGEST_BATCH)
    except SamplerExportError as exc:
        if max_batch is not None or exc.max_batch is None:
            raise
        return _export(module, noise, tensors, dynamic_batch, exc.max_batch)


def _export(
    module: SamplerModule, noise: Tensor, conditions: dict[str, Any], dynamic: bool, max_batch: int
) -> ExportedProgram:
    batch = Dim("batch", min=1, max=max_batch)

    def axes(t: Tensor) -> dict[int, Any]:
        return {0: batch} if t.ndim and t.shape[0] == noise.shape[0] else {}

    given = (noise, conditions) if conditions else (noise,)
    shapes = tree_map(axes, given) if dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(module, given, dynamic_shapes=shapes)
    except Exception as exc:
        raise SamplerExportError("the sampler cannot be exported", exc) from exc
    finally:
        # The trace left a tensor without values in it.
        module.sampler.denoiser._tap.__setstate__({})


def split_conditions(conditions: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what becomes an argument: tensors, and containers of nothing else; the rest)."""

    def is_argument(value: Any) -> bool:
        leaves = tree_leaves(value)
        return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)

    given = conditions or {}
    arguments = {k: v for k, v in given.items() if is_argument(v)}
    return arguments, {k: v for k, v in given.items() if k not in arguments}


def _check(noise: Tensor, dynamic_batch: bool, max_batch: int | None, batched: bool) -> None:
    if noise.ndim < 1 or noise.shape[0] < 1 or not noise.is_floating_point():
        raise ValueError(
            f"noise is {noise.dtype} {tuple(noise.shape)}, expected floating point [B, ...], B >= 1"
        )
    if not dynamic_batch:
        return
    if batched:
        raise ValueError(
            "the table has a row for each sample, so it fits one batch: pass dynamic_batch=False"
        )
    most = LARGEST_BATCH if max_batch is None else max_batch
    if not 2 <= noise.shape[0] <= most:
        raise ValueError(
            f"noise has batch {noise.shape[0]} and max_batch is {most}: give an example of at "
            "least 2 and at most max_batch samples, or pass dynamic_batch=False"
        )


def bounds(program: ExportedProgram, noise: Tensor) -> tuple[int, int]:
    """Smallest and largest batch that ``program`` takes."""
    ranges = [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()]
    return ranges[0] if ranges else (noise.shape[0], noise.shape[0])


def describe(
    sampler: Sampler, noise: Tensor, conditions: Mapping[str, Any] | None, batch: tuple[int, int]
) -> dict[str, Any]:
    """What is in a package, JSON-able; ``aoti_load_package(path).get_metadata()`` has it."""
    policy = sampler.policy
    return {
        "version": __version__,
        "solver": policy.describe()["name"],
        "nfe": sampler.nfe,
        "process": policy.process.config(),
        "sigma_start": float(policy.process.sigma(sampler._start_time())),
        "noise": {
            "shape": ["B", *noise.shape[1:]],
            "batch": list(batch),
            "dtype": str(noise.dtype).removeprefix("torch."),
            "device": noise.device.type,
        },
        "cond": sorted(split_conditions(conditions)[0]),
    }


def export_sampler(
    sampler: Sampler,
    noise: Tensor,
    path: str | Path,
    *,
    conditions: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    max_batch: int | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    overwrite: bool = True,
    cond: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``sampler`` to ``path`` as an AOTInductor package.

    ``torch._inductor.aoti_load_package(path)`` gives it back as a function: ``run(noise)``, or
    ``run(noise, {name: tensor, ...})`` with ``conditions``. Neither needs this library; from C++ it is
    an ``AOTIModelPackageLoader``. Weights, rows and what a policy learned are inside.

    Args:
        noise: ``[B, ...]`` an example of the state at the start, on the device and in the dtype
            that the package will be given; only its shape matters. B >= 2 with ``dynamic_batch``.
        path: a name that ends in ``.pt2``. The package is put together in memory and then takes the
            place of what was there in one go.
        conditions: what the network is also given. Tensors, and containers of tensors alone, become
            arguments, with a free batch where their first size is B; the rest becomes part of the
            package.
        dynamic_batch: any batch from 1 to ``max_batch``; False for the example's alone.
        max_batch: None is 4096, or less where the network takes another path for large batches.
        inductor_configs: handed to Inductor, such as ``{"max_autotune": True}``.
        overwrite: whether an existing file may be replaced.
        cond: ``conditions`` by their earlier name.

    Returns:
        ``path``.

    Raises:
        ValueError: the arguments do not fit together.
        FileExistsError: ``path`` is there and ``overwrite`` is False.
        OSError: it cannot be written (full disk, read-only folder); what was there is untouched.
        SamplerExportError: the network cannot be traced or compiled; the message says why.
    """
    path, conditions = Path(path), one_of_two(conditions, cond)
    if path.suffix != ".pt2":
        raise ValueError(f"path is {path}, expected a name that ends in .pt2")
    refuse_existing(path, overwrite)
    require_writable(path)  # ahead of minutes of compiling
    with replacing(path) as partial:
        partial.write_bytes(
            _package(sampler, noise, conditions, dynamic_batch, max_batch, inductor_configs)
        )
    return path


def refuse_existing(path: Path, overwrite: bool) -> None:
    """FileExistsError if ``path`` is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: pass overwrite=True (dlms export --overwrite) or choose another output"
        )


def _package(
    sampler: Sampler,
    noise: Tensor,
    conditions: Mapping[str, Any] | None,
    dynamic_batch: bool,
    max_batch: int | None,
    inductor_configs: Mapping[str, Any] | None,
) -> memoryview:
    """The package's bytes. Not written by torch: on a full disk its writer aborts the process."""
    program = trace_sampler(
        sampler, noise, conditions=conditions, dynamic_batch=dynamic_batch, max_batch=max_batch
    )
    metadata = {METADATA: json.dumps(describe(sampler, noise, conditions, bounds(program, noise)))}
    configs = {"aot_inductor.metadata": metadata, **(inductor_configs or {})}
    package = io.BytesIO()
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=package, inductor_configs=configs
        )
    except Exception as exc:
        raise SamplerExportError("the sampler cannot be compiled", exc) from exc
    return package.getbuffer()

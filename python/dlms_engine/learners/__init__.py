"""Learners of solver tables and the one call that runs them."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..engine.captured_calls import captured_calls
from ..models.denoiser import Denoiser
from ..policies.distilled import DistilledSolver
from ..processes import require_known
from ..support.allocator import freed_memory_kept
from ..support.files import only_one, require_writable
from ..support.parallel import World, restarted
from ..support.renamed import one_of_two
from ..support.values import seed_number, whole_number
from .begin import begun
from .entry import LearnerEntry
from .options import RunOptions
from .registry import LEARNERS, learner, register_learner, resolved
from .start.problem import Conditions, SamplingProblem, read_conditions
from .start.repeatable import require_repeatable
from .training.conditioned import conditioned
from .training.identity import named_conditions, run_identity
from .training.monitor import Silent, TensorBoard

_log = logging.getLogger("dlms_engine")

__all__ = [
    "LEARNERS",
    "DistilledSolver",
    "LearnerEntry",
    "RunOptions",
    "distill",
    "register_learner",
]


def distill(
    denoiser: Denoiser,
    method: str = "auto",
    *,
    nfe: int = 5,
    shape: tuple[int, ...],
    trajectories: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    seed: int = 0,
    feature_network: Any = None,
    conditions: Conditions = None,
    cond: Conditions = None,
    tensorboard: str | Path | None = None,
    capture: bool = False,
    **settings: Any,
) -> DistilledSolver:
    """Distils a solver of ``nfe`` evaluations for ``denoiser``; the network stays frozen.

    Args:
        denoiser: the model.
        method: one of ``LEARNERS``.
        nfe: network evaluations of the result.
        shape: shape of one sample, e.g. ``(3, 32, 32)``.
        trajectories: start noises to train on; None is the method's own default.
        output: path of the solver file; the checkpoint is written next to it.
        resume: continue from that checkpoint; a run that torchrun restarted does so by itself.
        progress: show progress bars.
        seed: of the training noise.
        feature_network: module from finished samples to ``[B, F]`` for feature distances.
        conditions: keyword arguments of the network. A tensor ``[1, ...]`` serves all samples, a tensor
            ``[M, ...]`` gives sample i its row i mod M; also a callable or a safetensors file
            (``learners.start.Conditions``). LD3, D-ODE and GITS take one row.
        cond: their earlier name.
        tensorboard: folder for TensorBoard events, one scalar a number and update.
        capture: replay the network's evaluations, and their gradients, as CUDA graphs: for networks on
            a GPU that are bound by their launches (docs/captured_runs.md). What cannot be captured is
            evaluated as ever and logged once.
        settings: the method's own settings; unknown names are refused. Where none fixes the solver or
            grid to begin at, the best for this model is found by measuring.

    Returns:
        a ``DistilledSolver``, also written to ``output``.

    Raises:
        ValueError: unknown method or setting, values out of range, or a network that does not answer
            the same twice, or not the same in another batch; ``capture`` without a GPU; ``auto`` in
            several processes; an ``output`` that could not name a process of your own.
        ImportError: ``tensorboard`` is requested and missing.
        FloatingPointError: the network's outputs are not finite.
        RuntimeError: another process is distilling into ``output``.
        OSError: ``output`` cannot be written, as found ahead of the work where possible; a
            checkpoint is kept.
    """
    entry = learner(method)
    nfe, seed = whole_number(nfe, "nfe"), seed_number(seed)
    world = World.current()
    if method == "auto" and world.size > 1:
        raise ValueError(
            f"method 'auto' runs in one process, and here are {world.size}, which would all do the same "
            "and write the same files: start it without torchrun, or take another method"
        )
    resolved(method, nfe, settings, trajectories=trajectories)  # refuses what is wrong at once
    conditions = read_conditions(one_of_two(conditions, cond))
    identity = {} if output is None else run_identity(denoiser, named_conditions(conditions))
    problem = SamplingProblem(denoiser, shape, conditions, seed=seed)
    shape = problem.shape
    if method != "auto":
        denoiser, conditions = conditioned(denoiser, conditions, method), None
    path = None if output is None else Path(output)
    if path is not None:
        require_known(denoiser.process)
    shown = progress and world.rank == 0
    watched = tensorboard is not None and world.rank == 0
    options = RunOptions(
        nfe,
        trajectories,
        path,
        resume or restarted(),
        shown,
        seed,
        settings,
        feature_network,
        conditions or {},
        TensorBoard(str(tensorboard)) if watched else Silent(),
        identity,
    )
    lock = contextlib.nullcontext() if path is None or world.rank else only_one(path)
    calls = captured_calls(denoiser) if capture else contextlib.nullcontext()
    if any(p.is_inference() for p in denoiser.parameters()):
        raise ValueError(
            "the network was made under torch.inference_mode(), whose tensors autograd does not take: "
            "make or load it outside"
        )
    training = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        # A caller may have switched gradients off, which nothing in a training can.
        with lock, calls, freed_memory_kept(), torch.inference_mode(False), torch.enable_grad():
            if path is not None and not world.rank:
                require_writable(path)
            require_repeatable(problem)
            if options.resume and not world.rank and not _exists(options.checkpoint):
                where = (
                    "without an output" if path is None else f"{options.checkpoint} is not there"
                )
                _log.warning("resume: %s: %s starts from the beginning", where, method)
            options.settings = begun(
                entry.begin,
                problem,
                nfe,
                settings,
                store=None if path is None or world.rank else path.with_suffix(".start.json"),
                say=tqdm.write if shown else lambda line: None,
            )
            solver = entry.run(denoiser, shape, options)
    except FloatingPointError as error:
        if not _exists(options.checkpoint):
            raise
        raise FloatingPointError(
            f"{error}; {options.checkpoint} holds the last good state"
        ) from error
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
        options.monitor.close()
    if path is not None and world.rank == 0:
        _save(solver, path, options.checkpoint)
    world.barrier()
    return solver


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def _save(solver: DistilledSolver, path: Path, checkpoint: Path | None) -> None:
    """Writes the solver, which makes its checkpoint needless."""
    try:
        solver.save(path)
    except OSError as error:
        if not _exists(checkpoint):
            raise
        raise OSError(f"{error}; {checkpoint} is kept, resume goes on from it") from error
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)

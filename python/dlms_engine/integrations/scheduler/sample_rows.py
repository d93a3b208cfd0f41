"""Rows that a learned solver computes for every sample, from the bottleneck that a ``Watch`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ops import layout
from ...solvers.policy import Policy, PolicyRun
from .noise import NoiseModel
from .watch import Watch


class SampleRows:
    """The rows of one run of ``policy``, and every sample's own next time, which goes to ``watch``.

    Raises:
        ValueError: nothing watches the network, or a model or a setting that such rows do not have.
    """

    def __init__(
        self, policy: Policy, model: NoiseModel, watch: Watch | None, config: Mapping[str, Any]
    ) -> None:
        if watch is None:
            raise ValueError(
                "this solver computes its rows from the network's bottleneck: call "
                "scheduler.watch(pipe.unet) first, or use its static table, "
                "solver.table(denoiser, noise)"
            )
        if model.kind == "edm":
            raise ValueError(
                "per-sample solvers are not supported on EDM pipelines: use the static table, "
                "solver.table(denoiser, noise)"
            )
        for key in ("clip_sample", "thresholding"):
            if config[key]:
                raise ValueError(
                    f"{key} is True: a solver with rows of its own for every sample does not clip"
                )
        self._policy, self._model, self._watch = policy, model, watch
        self._run: PolicyRun | None = None

    @torch.no_grad()
    def row(self, n: int, sample: Tensor, scale: float, depth: int, times: list[float]) -> Tensor:
        """``[B, 6 + depth]`` packed row ``n``, after the network was called for it.

        Args:
            sample: latents ``[B, ...]``.
            scale: of the given state, part of row 0.
            times: ``[rows]`` what the pipeline passes to the network.
        """
        batch, model = sample.shape[0], self._model
        if self._run is None or n == 0:  # row 0 comes again where the latents' shape has changed
            self._run = self._policy.start(batch, sample.device)
            self._time = self._run.time
        row = self._run.row(n, self._watch.features(batch))
        pre = model.preconditioning(self._time.expand(batch), self._policy.prediction)
        scale = scale if n == 0 else 1.0
        packed = layout.pack_row(
            c_skip=pre.c_skip * scale,
            c_out=pre.c_out,
            a=row.a.expand(batch) * scale,
            c_in_next=torch.ones_like(pre.c_skip),
            guidance=1.0,
            slot=n % depth,
            b=row.b,
        )
        if row.next_time is None:
            self._watch.ratio = None
        else:
            self._time = row.next_time.expand(batch)
            self._watch.ratio = model.timestep(self._time) / times[n + 1]
        return packed

"""What a solver was distilled for, and whether it is used there.

A solver that was distilled for a pipeline has in its settings ``{"pipeline": {...}}``: the pipeline's
class, the model's name and some of its weights, the latents' shape, the guidance scale and the number
of evaluations. At use these are compared with the pipeline that calls the scheduler, and each
difference is said once, by name. Everything read from a file is untrusted: what has another type is
not compared.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger("dlms_engine")
ORIGIN = "pipeline"
WEIGHTS = 16  # weights that stand for a model
_FRAMES = 12  # callers that are looked at
_NAMES = ("unet", "transformer", "prior", "decoder")


def origin_of(source: Any) -> dict[str, Any]:
    """What ``source`` was distilled for; empty where it does not say."""
    settings = getattr(source, "settings", None)
    found = settings.get(ORIGIN) if isinstance(settings, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def pipeline_facts(
    pipe: Any,
    shape: tuple[int, ...],
    guidance_scale: float | None,
    nfe: int,
    guidance_scale_2: float | None = None,
    own_times: bool = False,
) -> dict[str, Any]:
    """What a solver's settings say of the pipeline it was distilled for.

    Args:
        shape: of one sample's latents, as the scheduler sees them.
        guidance_scale: None without guidance.
        guidance_scale_2: of a second network.
        own_times: whether the pipeline itself passes times to ``set_timesteps`` (Mochi): a learned
            solver, which has others, leaves them out.
    """
    facts = {
        "class": type(pipe).__name__,
        "model": _model_of(pipe),
        "weights": _weights(_networks(pipe)),
        "latents": list(shape),
        "guidance_scale": guidance_scale,
        "nfe": nfe,
    }
    more = {
        "boundary": _boundary(pipe),
        "guidance_scale_2": guidance_scale_2,
        "own_times": own_times or None,
    }
    return facts | {key: value for key, value in more.items() if value is not None}


class OriginCheck:
    """Compares runs of one scheduler with its solver's origin; says each difference once."""

    def __init__(self, source: Any) -> None:
        self._origin = origin_of(source)
        self._learned = not isinstance(source, str)
        self._said: set[str] = set()

    def caller(self, scheduler: Any) -> None:
        """The pipeline that calls ``scheduler`` now: class, model and guidance."""
        if not self._origin:
            return
        pipe, scales = calling_pipeline(scheduler)
        if pipe is None:
            return
        self._differs("class", type(pipe).__name__, str)
        self._differs("boundary", _boundary(pipe), float)
        self._model(pipe)
        for key in ("guidance_scale", "guidance_scale_2"):
            wanted = self._origin.get(key)
            if not isinstance(wanted, (int, float)) or not scales:
                continue
            near = scales[
                min(range(len(scales)), key=[abs(s - wanted) for s in scales].__getitem__)
            ]
            if abs(near - wanted) > 1e-6 * max(abs(wanted), 1.0):
                self._say(key, wanted, near)

    def latents(self, shape: tuple[int, ...]) -> None:
        """The latents' shape ``[B, ...]`` at a run's first step."""
        if self._origin:
            self._differs("latents", list(shape[1:]), list)

    def late(self, index: int, count: int) -> None:
        """A run of ``count`` steps that begins at step ``index`` (image-to-image)."""
        key = f"late {index}"
        if not self._learned or not index or key in self._said:
            return
        self._said.add(key)
        _log.warning(
            "the run begins at step %d of %d, and the solver was made for whole runs, strength 1: its "
            "last %d steps run, the first of them at first order. Strength %.3g to 1 has more of them; "
            'the handcrafted solver="unipc" is made anew for any strength and number of steps',
            index,
            count,
            count - index,
            min((count - index + 1) / count, 1.0),
        )

    def _model(self, pipe: Any) -> None:
        networks, wanted = _networks(pipe), self._origin.get("weights")
        if not networks or not isinstance(wanted, list):
            return
        found = _weights(networks)
        alike = len(found) == len(wanted) and all(
            isinstance(w, (int, float)) and math.isclose(w, f, rel_tol=2e-2, abs_tol=1e-3)
            for w, f in zip(wanted, found, strict=True)
        )
        if not alike:
            name = str(self._origin.get("model") or "another model")
            self._say(
                "model", name, f"{_model_of(pipe) or type(networks[0]).__name__}, other weights"
            )

    def _differs(self, key: str, found: Any, kind: type) -> None:
        wanted = self._origin.get(key)
        if isinstance(wanted, kind) and wanted != found:
            self._say(key, wanted, found)

    def _say(self, key: str, wanted: Any, found: Any) -> None:
        if key not in self._said:
            self._said.add(key)
            _log.warning("the solver was distilled for %s %s, this run's is %s", key, wanted, found)


def calling_pipeline(scheduler: Any) -> tuple[Any, list[float]]:
    """Whose loop calls ``scheduler``, and the guidance scales among that call's variables.

    A scheduler is not given its pipeline: it is looked for among the callers.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_back is None:
            break
        frame = frame.f_back
        for name in ("self", "pipe", "components"):
            pipe = frame.f_locals.get(name)
            if pipe is not scheduler and getattr(pipe, "scheduler", None) is scheduler:
                return pipe, _scales(frame.f_locals, pipe)
    return None, []


def _scales(variables: Mapping[str, Any], pipe: Any) -> list[float]:
    ends = ("guidance_scale", "guidance_scale_2", "cfg_scale")
    named = {k: v for k, v in variables.items() if k.endswith(ends)}
    named["own"] = getattr(pipe, "_guidance_scale", None)
    return [
        float(v)
        for v in named.values()
        if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    ]


def find_network(pipe: Any) -> nn.Module | None:
    """What a pipeline denoises with, a compiled one included; None where it has no such part."""
    for name in _NAMES:
        network = getattr(pipe, name, None)
        if isinstance(network, nn.Module):
            return network
    return None


def _networks(pipe: Any) -> list[nn.Module]:
    """What a pipeline denoises with: two networks where it switches them by time."""
    second = getattr(pipe, "transformer_2", None)
    return [n for n in (find_network(pipe), second) if isinstance(n, nn.Module)]


def _boundary(pipe: Any) -> float | None:
    """Where two networks are switched, as a share of the training times."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return float(ratio) if isinstance(ratio, (int, float)) else None


def _model_of(pipe: Any) -> str:
    """The name under which the pipeline was loaded: ``owner/name`` or its folder's own name."""
    config = getattr(pipe, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else None
    name = str(name or getattr(pipe, "name_or_path", "") or "")
    return name.rstrip("/").rsplit("/", 1)[-1] if name.startswith(("/", ".")) else name


@torch.no_grad()
def _weights(networks: list[nn.Module]) -> list[float]:
    """The middle number of ``WEIGHTS`` parameters, evenly spread, to three digits.

    They are the same in half precision; a fine-tuned model differs in some of them.
    """
    parameters = [p for network in networks for p in network.parameters() if p.numel()]
    if not parameters:
        return []
    places = [parameters[i * len(parameters) // WEIGHTS] for i in range(WEIGHTS)]
    return [_number(p) for p in places]


def _number(parameter: Tensor) -> float:
    if parameter.is_meta or not parameter.is_floating_point():
        return 0.0
    value = float(parameter.detach().reshape(-1)[parameter.numel() // 2])
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0

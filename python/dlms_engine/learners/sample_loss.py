"""Distances of finished samples, one number per sample, for learners with an endpoint loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..denoiser import Denoiser
from .losses import last_step_distance

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(student, target) ``[B, ...]`` -> ``[B]``, differentiable in the student."""

KINDS = ("auto", "l2", "l1", "bottleneck", "features", "lpips")


def l2(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    return (student - target).square().flatten(1).mean(1)


def l1(student: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (student - target).abs().flatten(1).mean(1)


def resolve_kind(
    kind: str, denoiser: Denoiser, feature_network: nn.Module | None, lpips_weights: Any
) -> str:
    """What ``"auto"`` stands for: the most perceptual distance that can be had."""
    if kind not in KINDS:
        raise ValueError(f"loss is {kind!r}, expected a callable or one of {KINDS}")
    if kind != "auto":
        return kind
    if lpips_weights is not None:
        return "lpips"
    if feature_network is not None:
        return "features"
    return "bottleneck" if denoiser.features is not None else "l2"


def sample_loss(
    kind: str | SampleLoss,
    denoiser: Denoiser,
    *,
    feature_sigma: float = 0.1,
    feature_network: nn.Module | None = None,
    lpips_weights: str | Path | None = None,
) -> SampleLoss:
    """The loss called ``kind``, or ``kind`` itself where it is a callable.

    A callable is the way to losses on decoded images: ``lambda a, b: lpips(decode(a), decode(b))``.

    Raises:
        ValueError: unknown kind, or what it needs is missing.
    """
    if not isinstance(kind, str):
        return kind
    kind = resolve_kind(kind, denoiser, feature_network, lpips_weights)
    if kind in ("l2", "l1"):
        return l2 if kind == "l2" else l1
    if kind == "lpips":
        return lpips_loss(lpips_weights)
    distance = last_step_distance(denoiser, kind, feature_sigma, feature_network)
    assert distance is not None
    return distance


def lpips_loss(weights: str | Path | None) -> SampleLoss:
    """LPIPS v0.1 with the VGG backbone (Zhang et al. 2018), inputs in [-1, 1], not resized.

    Args:
        weights: safetensors file with the state dict of ``lpips.LPIPS(net="vgg")``.

    Raises:
        ValueError: no weights, or a file that does not fit.
        ImportError: the ``lpips`` package is not installed.
    """
    if weights is None:
        raise ValueError(
            "loss='lpips' needs lpips_weights=, a safetensors file with the state dict of "
            "lpips.LPIPS(net='vgg'); loss='bottleneck' needs no weights"
        )
    from safetensors.torch import load_file

    try:
        import lpips  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError("loss='lpips' needs the lpips package: pip install lpips") from error
    network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    try:
        network.load_state_dict(load_file(str(weights)))
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold the weights of lpips.LPIPS: {error}") from error
    network.eval().requires_grad_(False)

    def distance(student: Tensor, target: Tensor) -> Tensor:
        values = network(student.float(), target.float())
        assert isinstance(values, Tensor)
        return values.flatten(1).mean(1)

    return distance

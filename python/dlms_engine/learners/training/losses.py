"""Distances of finished samples: pixels, the network's own bottleneck, a feature network, LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.denoiser import Denoiser
from ...support.parallel import World

FeatureDistance = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher) ``[B, ...]`` -> ``[B]`` squared distances, with gradient in the student."""


SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(student, target) ``[B, ...]`` -> ``[B]``, differentiable in the student."""

KINDS = ("auto", "l2", "l1", "bottleneck", "features", "lpips")


def last_step_distance(
    denoiser: Denoiser, kind: str, sigma: float, feature_network: nn.Module | None
) -> FeatureDistance | None:
    """The distance named ``kind``; None for plain pixels.

    Raises:
        ValueError: unknown kind, no feature network or no feature tap where one is needed.
    """
    if kind == "pixels":
        return None
    if kind == "features":
        if feature_network is None:
            raise ValueError(
                "last_step='features' needs feature_network=, a module from images to [B, F]; "
                "last_step='bottleneck' uses the denoiser itself"
            )
        return _distance(_frozen(feature_network.to(denoiser.device)))
    if kind == "bottleneck":
        if denoiser.features is None:
            raise ValueError(
                "last_step='bottleneck' needs the Denoiser's feature tap: features='mid_block'"
            )
        return _distance(bottleneck_features(denoiser, sigma))
    raise ValueError(f"last_step is {kind!r}, expected 'pixels', 'bottleneck' or 'features'")


def bottleneck_features(denoiser: Denoiser, sigma: float) -> Callable[[Tensor], Tensor]:
    """``[B, ...]`` finished samples -> ``[B, F]``, the bottleneck at noise level ``sigma``.

    No noise is added: the network is called at a time whose sigma / alpha is ``sigma``, where its
    features respond to structure and not to single pixels.
    """
    level = denoiser.process.inverse_sigma(torch.tensor(sigma, dtype=torch.float64, device="cpu"))

    def features(x: Tensor) -> Tensor:
        scale = float(denoiser.process.alpha(level))
        denoiser.predict(scale * x, level)
        return denoiser.bottleneck.float().flatten(1)

    return features


def _frozen(network: nn.Module) -> Callable[[Tensor], Tensor]:
    network.eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        out = network(x)
        assert isinstance(out, Tensor)
        return out.flatten(1)

    return features


def _distance(features: Callable[[Tensor], Tensor]) -> FeatureDistance:
    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(teacher)
        return (features(student) - wanted).square().sum(1)

    return distance


def log_distance(
    end: Tensor, target: Tensor, distance: FeatureDistance | None, world: World
) -> Tensor:
    """Logarithm of the mean squared pixel distance of ``[B, ...]``, plus that of the features'."""
    loss = log_mean((end - target).square().mean(), len(end), world)
    if distance is None:
        return loss
    return loss + log_mean(distance(end, target).mean(), len(end), world)


def log_mean(mean: Tensor, count: int, world: World) -> Tensor:
    """Logarithm of the mean over all ranks, from the ``mean`` over this rank's ``count`` samples.

    A logarithm of shares is not a share of the logarithm: the gradient is that of the rank's mean over
    the common one, so that the ranks' gradients, weighted by their counts, add up to the whole's.
    """
    if world.size == 1:
        return mean.log()
    wide = mean.detach().double()
    sums = torch.stack([wide * count, torch.full_like(wide, count)])
    total, number = world.sum_(sums).unbind()
    whole = (total / number).to(mean.dtype)
    share = mean / whole
    return share - share.detach() + whole.log()


def l2(student: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    return (student - target).square().flatten(1).mean(1)


def l1(student: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (student - target).abs().flatten(1).mean(1)


def resolve_kind(
    kind: str, denoiser: Denoiser, feature_network: nn.Module | None, lpips_weights: Any
) -> str:
    """What ``"auto"`` stands for: the most perceptual distance available."""
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

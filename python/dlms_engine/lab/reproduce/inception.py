"""FID's features and reference statistics: torch-fidelity's Inception, with weights that are given.

Nothing is downloaded. The distance itself is ``evaluation.frechet``'s, torchmetrics' formula.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...checkpoints.formats import read_tensors
from ...models.embedded import ReferenceStatistics
from ..evaluation.frechet import label_of_features
from .data_sets import INCEPTION

_WIDTH = 2048
_COUNT = 50_000  # of the reference: statistics do not say it, and it cancels


class InceptionFeatures(nn.Module):
    """Images ``[B, 3, H, W]`` in [-1, 1] -> ``[B, 2048]`` features of the Inception of FID.

    Measured images are rounded to 8 bits, as files are; where a gradient is asked for, as in DLMS's
    last step, they are not.

    Args:
        network: torch-fidelity's, from ``read_inception``.
        rounded: measure, through the network's own call; False keeps gradients.
    """

    label = "FID"
    num_features = _WIDTH

    def __init__(self, network: nn.Module, *, rounded: bool = True) -> None:
        super().__init__()
        self.network = network
        self.rounded = rounded

    def forward(self, images: Tensor) -> Tensor:
        pixels = 127.5 * images.float() + 128
        if self.rounded:
            found: Tensor = self.network(pixels.clamp(0, 255).to(torch.uint8))[0]
            return found
        from torch_fidelity.interpolate_compat_tensorflow import (  # type: ignore[import-not-found,unused-ignore]
            interpolate_bilinear_2d_like_tensorflow1x as resized,
        )

        # The layers of the network's own call, which takes whole numbers alone, in their order.
        x: Tensor = (resized(pixels, size=(299, 299), align_corners=False) - 128) / 128
        for name, layer in self.network.named_children():
            if name == "fc":
                break
            x = layer(x)
        return x.flatten(1)


class DecodedFeatures(nn.Module):
    """Features of decoded latents: ``features(decode(latents))``."""

    def __init__(self, features: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.decode = decode
        self.label = label_of_features(features)

    def forward(self, latents: Tensor) -> Tensor:
        found: Tensor = self.features(self.decode(latents).clamp(-1, 1))
        return found


def read_inception(weights: Path) -> nn.Module:
    """torch-fidelity's feature network with the tensors in ``weights``, frozen.

    Raises:
        ImportError: torch-fidelity or torchmetrics is missing.
        UnsafeCheckpointError: the file holds more than tensors.
        ValueError: the tensors are not that network's.
        OSError: it cannot be read.
    """
    try:
        import torchmetrics  # noqa: F401
        from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found,unused-ignore]
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise ImportError(
            f"FID needs torch-fidelity and torchmetrics ({error}): pip install 'dlms-engine[fid]'"
        ) from error
    if not weights.is_file():
        raise FileNotFoundError(f"fid-weights: there is no {weights}, expected {INCEPTION}")
    read_tensors(weights)  # refuses pickled code before torch-fidelity opens the file
    arguments: dict[str, Any] = {"feature_extractor_weights_path": str(weights)}
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(_WIDTH)], **arguments)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit: {error}; expected {INCEPTION}") from error
    assert isinstance(network, nn.Module)
    return network.eval().requires_grad_(False)


def read_fid_statistics(path: Path) -> ReferenceStatistics:
    """Of the data's features, from an ``.npz`` with ``mu`` ``[2048]`` and ``sigma`` ``[2048, 2048]``.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            names = sorted(held.files)
            mean, covariance = (torch.from_numpy(held[k]).double() for k in ("mu", "sigma"))
    except KeyError as error:
        raise ValueError(f"{path} holds {names}, expected mu and sigma: FID statistics") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no .npz of plain arrays: {error}") from error
    if mean.shape != (_WIDTH,) or covariance.shape != (_WIDTH, _WIDTH):
        raise ValueError(
            f"{path}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, expected "
            f"({_WIDTH},) and ({_WIDTH}, {_WIDTH})"
        )
    return ReferenceStatistics(_COUNT, mean, covariance)

"""Models that ship with the package and run after a plain install: emoji, diffused and flowed.

``assets/NAME/`` holds ``config.json`` (network, process, prediction, names of the classes),
``network.safetensors`` (the averaged weights in bfloat16), ``provenance.json`` and ``MODEL_CARD.md``;
``features.safetensors`` and ``reference.safetensors`` lie there, too, or in the folder that the
configuration names. :func:`read` takes any folder of this form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..processes import from_config
from .denoiser import Denoiser
from .embedded import ReferenceStatistics
from .features import ResidualFeatures
from .unet import UNet

NAMES = ("emoji", "emoji-flow")
"""Models of the package that :func:`load` knows."""
NETWORK_FILES = ("config.json", "network.safetensors", "provenance.json")
_KEYS = {"network", "process", "prediction", "sigma_data", "classes", "features"}


class PretrainedModel(NamedTuple):
    """A model and what its samples are measured with.

    Attributes:
        denoiser: E[x0 | x, t], its middle block tapped.
        shape: of one sample, channels first; values lie in [-1, 1].
        features: images ``[B, *shape]`` -> ``[B, F]``, float32.
        reference: statistics of these features over the training images.
        classes: names; their places are ``class_labels``. Empty: unconditional.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    features: nn.Module
    reference: ReferenceStatistics
    classes: tuple[str, ...]

    def labels(self, *names: str) -> Tensor:
        """``class_labels`` int64 ``[len(names)]``, where the network lies.

        Raises:
            ValueError: no such class.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise ValueError(f"classes {unknown} are not among {', '.join(self.classes) or 'none'}")
        numbers = [self.classes.index(name) for name in names]
        return torch.tensor(numbers, device=self.denoiser.device)


def load(
    name: str = "emoji",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    guidance_scale: float | None = None,
) -> PretrainedModel:
    """A model of the package, in eval mode, with frozen parameters.

        model = dlms.models.load("emoji")
        images = sampler.sample(seeds=range(4), shape=model.shape,
                                class_labels=model.labels("face", "heart", "food", "flag"))

    Args:
        name: ``"emoji"`` (EDM) or ``"emoji-flow"`` (rectified flow).
        device: where the networks live.
        dtype: of the network; the sampler's state stays float32, and so do the features.
        guidance_scale: of classifier-free guidance; samples then need ``class_labels``.

    Raises:
        ValueError: no such model.
        FileNotFoundError: the installation lacks its files.
    """
    return read(folder(name), device, dtype, guidance_scale=guidance_scale)


def folder(name: str) -> Path:
    """Where the files of a model of the package are.

    Raises:
        ValueError: no such model.
        FileNotFoundError: the installation lacks its files.
    """
    if name not in NAMES:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(NAMES)}")
    path = Path(__file__).resolve().parent / "assets" / name
    missing = [file for file in NETWORK_FILES if not (path / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the model {name} is not in {path} (missing: {', '.join(missing)}): reinstall "
            "dlms_engine, or train it with examples/train_models.py and export it with "
            "examples/export_models.py"
        )
    return path


def read(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    guidance_scale: float | None = None,
) -> PretrainedModel:
    """The model in a folder of ``examples/export_models.py``.

    Raises:
        ValueError: the configuration or a file is not of this form.
    """
    config = read_config(path)
    network = read_network(path, device, dtype)
    classes = tuple(str(name) for name in config["classes"])
    null = torch.tensor([len(classes)], device=device)
    denoiser = Denoiser(
        network,
        from_config(config["process"]),
        config["prediction"],
        sigma_data=config.get("sigma_data", 0.5),
        features="mid_block",
        guidance_scale=guidance_scale,
        unconditional={"class_labels": null} if classes else None,
    )
    features = features_folder(path, config)
    shape = (3, network.size, network.size)
    return PretrainedModel(
        denoiser, shape, read_features(features, device), read_reference(features), classes
    )


def read_config(path: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        ValueError: keys that this version does not know.
    """
    text = (path / "config.json").read_text(encoding="utf-8-sig")
    config = cast(dict[str, Any], json.loads(text))
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        raise ValueError(f"{path / 'config.json'} has {unknown}, expected {sorted(_KEYS)}")
    return config


def read_network(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet:
    """The U-Net, channels-last, frozen.

    Raises:
        ValueError: the weights are not those of the configuration.
    """
    from safetensors.torch import load_file

    network = UNet(**read_config(path)["network"]).float()  # whatever torch's default is
    _fill(network, load_file(path / "network.safetensors"), path / "network.safetensors")
    network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def features_folder(path: Path, config: Mapping[str, Any]) -> Path:
    """The folder of the feature files: ``path``, or its neighbour that the configuration names."""
    named = config.get("features")
    return path if named is None else path.parent / str(named)


def read_features(path: Path, device: torch.device | str = "cpu") -> ResidualFeatures:
    """The classifier's features, float32, channels-last, frozen.

    Raises:
        ValueError: the file does not hold such a network.
    """
    import safetensors
    from safetensors.torch import load_file

    file = path / "features.safetensors"
    with safetensors.safe_open(str(file), framework="pt") as opened:
        widths = (opened.metadata() or {}).get("widths", "")
    if not widths:
        raise ValueError(
            f"{file} does not say its widths: export it with examples/export_models.py"
        )
    network = ResidualFeatures(tuple(int(width) for width in widths.split(","))).float()
    _fill(network, load_file(file), file)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def read_reference(path: Path) -> ReferenceStatistics:
    """Feature statistics of the training images, float64 on the CPU."""
    from safetensors.torch import load_file

    stored = load_file(path / "reference.safetensors")
    return ReferenceStatistics(int(stored["count"]), stored["mean"], stored["covariance"])


def provenance(name: str) -> dict[str, Any]:
    """What a model's files are: data, licence, training, hardware, date, SHA-256 of every file."""
    text = (folder(name) / "provenance.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def _fill(network: nn.Module, stored: dict[str, Tensor], file: Path) -> None:
    missing, unexpected = network.load_state_dict(stored, strict=False)
    # BatchNorm's step counters are not stored: they play no part in eval mode.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"{file}: missing {missing}, unexpected {unexpected}")

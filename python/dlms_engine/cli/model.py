"""The model that a command works on."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .own_model import file_hint, own_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..models.denoiser import Denoiser
    from ..models.embedded import ReferenceStatistics

ModelOption = Annotated[
    str,
    typer.Option(
        help="'embedded', 'emoji', 'emoji-flow', 'cifar10-32' (see docs/benchmark_model.md), or "
        "module:function in the current folder or installed; it returns (denoiser, sample shape) "
        "or (denoiser, sample shape, conditions)."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Where the networks run: cpu, cuda or cuda:N. Default: where they load."),
]
ConditionsOption = Annotated[
    Path | None,
    typer.Option(
        help="Safetensors file of the network's keyword tensors: with M rows, sample or seed i gets "
        "row i mod M."
    ),
]


@dataclass(frozen=True)
class Model:
    """A model the commands work on; ``features`` and ``reference`` serve the Frechet distance.

    ``conditions`` are the network's keyword arguments, see ``learners.start.Conditions``.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    features: nn.Module | None = None
    reference: ReferenceStatistics | None = None
    conditions: Any = None


def load_model(spec: str, device: str | None = None, conditions: Path | None = None) -> Model:
    """A model of the package, a benchmark model, or what ``module:function`` returns.

    ``conditions``, a safetensors file, takes the place of the model's own.

    Its networks are on ``device``; under torchrun "cuda" is the rank's own. None leaves them where
    they load: the CPU, but for a benchmark model (DLMS_MODEL_DEVICE).

    Raises:
        ValueError: see ``own_model``, there is no such device, or the conditions are not tensors.
        FileNotFoundError: the benchmark model has not been made, or there are no such conditions.
    """
    if conditions is not None:
        from ..learners.start.problem import read_conditions

        return replace(load_model(spec, device), conditions=read_conditions(conditions))
    from .. import models
    from ..support.parallel import rank_device

    place = None if device is None else rank_device(device)
    if spec == "embedded":
        return _embedded(place)
    if spec in models.NAMES:
        return Model(*models.load(spec, place or "cpu")[:4])
    if not spec.partition(":")[2]:
        from ..lab import benchmark_model

        if spec in benchmark_model.RECIPES:
            return Model(*benchmark_model.load_benchmark_model(spec, place))
        names = ("embedded", *models.NAMES, *benchmark_model.RECIPES)
        raise ValueError(
            f"model is {spec!r}, expected {', '.join(map(repr, names))} or module:function"
            f"{file_hint(spec)}"
        )
    own = own_model(spec, Model)
    found = own if isinstance(own, Model) else Model(own[0], own[1], conditions=own[2])
    if place is not None:
        found.denoiser.to(place)
        if found.features is not None:
            found.features.to(place)
    return found


def _embedded(device: torch.device | None) -> Model:
    import torch

    from ..models import embedded
    from ..models.denoiser import Denoiser
    from ..processes import EDM

    network = embedded.embedded_network(device or "cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = Denoiser(
        network, EDM(), "edm", sigma_data=embedded.SIGMA_DATA, features="unet.mid_block"
    )
    features = embedded.embedded_features(device or "cpu")
    return Model(denoiser, embedded.IMAGE_SHAPE, features, embedded.embedded_reference())


def of_model(spec: str, conditions: Path | None = None) -> str:
    """`` --model SPEC --conditions FILE`` for a command line to show, empty for the default model."""
    model = "" if spec == "embedded" else f" --model {spec}"
    return model if conditions is None else f"{model} --conditions {shlex.quote(str(conditions))}"


def samples_name(model: Model) -> str:
    """A name for samples that ``dlms sample`` can write: a picture of images, else raw values.

    Raw values, too, where the extra that writes pictures is not installed.
    """
    from ..lab.plots import is_image

    pictures = is_image(model.shape) and importlib.util.find_spec("PIL") is not None
    return "samples.png" if pictures else "samples.safetensors"


def condition_rows(
    model: Model, seeds: Sequence[int], device: torch.device | None = None
) -> dict[str, Any]:
    """The network's keywords for these samples, on its device or another; see
    ``learners.start.Conditions``.
    """
    from ..learners.start.problem import check_conditions, conditions_on, read_conditions, rows_of

    conditions = conditions_on(read_conditions(model.conditions), device or model.denoiser.device)
    check_conditions(model.denoiser, conditions)
    return rows_of(conditions, seeds)


def distance_features(model: Model) -> nn.Module:
    """The model's feature network, else its own bottleneck, else its values; ``label`` names them."""
    if model.features is not None:
        return model.features
    from ..lab.evaluation.own_features import own_features

    conditional = getattr(model, "conditions", None) is not None
    return own_features(model.denoiser, model.shape, conditional=conditional)

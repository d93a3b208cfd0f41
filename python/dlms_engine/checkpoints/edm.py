"""EDM network snapshots (Karras et al. 2022) as denoisers, without executing pickled code.

    from dlms_engine.integrations.edm import load_edm

    denoiser = load_edm("edm-cifar10-32x32-uncond-vp.pkl", features="enc.8x8_block3")

One-time conversion:  python -m dlms_engine.checkpoints.edm snapshot.pkl snapshot.safetensors
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.denoiser import Denoiser
from ..processes import EDM
from ..support.files import replacing
from .formats import check_format, read_metadata, stamp
from .networks import NETWORKS
from .restricted import Record, UnsafeCheckpointError, read_pickle, state_dict

_FORMAT = "dlms_engine.edm/1"
# constructor arguments of training only, or of the reference code's numerics
IGNORED = {"label_dropout", "use_fp16", "model_type"}


@dataclass
class Snapshot:
    """A network as data.

    Attributes:
        kind: ``"SongUNet"`` or ``"DhariwalUNet"``.
        settings: its constructor arguments.
        sigma_min, sigma_max, sigma_data: of the preconditioning; the range is that of sampling.
        tensors: state dict of the network.
    """

    kind: str
    settings: dict[str, Any]
    sigma_min: float
    sigma_max: float
    sigma_data: float
    tensors: dict[str, Tensor]

    def network(self) -> nn.Module:
        """The module with its weights, in evaluation mode.

        Raises:
            ValueError: unknown network or arguments, tensors that do not fit.
        """
        if self.kind not in NETWORKS:
            raise ValueError(f"network is {self.kind!r}, expected one of {sorted(NETWORKS)}")
        cls = NETWORKS[self.kind]
        known = set(inspect.signature(cls).parameters)
        unknown = sorted(set(self.settings) - known - IGNORED)
        if unknown:
            raise ValueError(f"{self.kind} has arguments {unknown} that this version does not know")
        settings = {k: v for k, v in self.settings.items() if k in known}
        self._check_size(settings)
        try:
            with torch.device(
                "meta"
            ):  # a file's claims cost no memory until the weights bear them out
                shapes = {k: v.shape for k, v in cls(**settings).state_dict().items()}
            wrong = [k for k, v in self.tensors.items() if shapes.get(k, v.shape) != v.shape]
            if wrong or set(shapes) - set(self.tensors):
                named = sorted(wrong or set(shapes) - set(self.tensors))[0]
                raise RuntimeError(f"{named!r} is missing or of another shape")
            network: nn.Module = cls(**settings).float()  # whatever torch's default is
            network.load_state_dict(self.tensors)
        except (RuntimeError, TypeError, ArithmeticError, LookupError) as exc:
            raise ValueError(f"the weights do not fit {self.kind}{self.settings}: {exc}") from exc
        return network.eval().requires_grad_(False)

    def _check_size(self, settings: dict[str, Any]) -> None:
        """Refuses arguments for more blocks than the file has tensors: building them could take for
        ever.
        """
        blocks, levels = settings.get("num_blocks", 1), settings.get("channel_mult", [1])
        plain = type(blocks) is int and isinstance(levels, (list, tuple))
        if not plain or not 0 < blocks * len(levels) <= len(self.tensors):
            raise ValueError(
                f"the weights do not fit {self.kind}: num_blocks is {str(blocks)[:40]} and "
                f"channel_mult {str(levels)[:40]}, with {len(self.tensors)} tensors in the file"
            )


def read_snapshot(path: str | Path) -> Snapshot:
    """Reads a ``.pkl`` snapshot (restricted) or a converted ``.safetensors``.

    Raises:
        UnsafeCheckpointError: the pickle asks for more than tensors and arguments.
        ValueError: not a snapshot of an EDM-preconditioned network.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_converted(path)
    held = read_pickle(path)
    record = held.get("ema") if isinstance(held, dict) else held
    if not isinstance(record, Record):
        raise ValueError(f"{path}: no network under 'ema', found {type(record).__name__}")
    if record.kind != "EDMPrecond":
        raise ValueError(
            f"{path}: preconditioning is {record.kind!r}, expected 'EDMPrecond'; other models can "
            "be given to Denoiser as networks"
        )
    model = (record.state.get("_modules") or {}).get("model")
    if not isinstance(model, Record):
        raise ValueError(f"{path}: the preconditioning holds no model")
    settings = dict(model.state.get("_init_kwargs") or {})
    positional = (
        list(inspect.signature(NETWORKS[model.kind]).parameters) if (model.kind in NETWORKS) else []
    )
    settings |= dict(zip(positional, model.state.get("_init_args") or (), strict=False))
    outer = record.state
    return Snapshot(
        kind=model.kind,
        settings=settings,
        # the training range is (0, inf); sampling uses 0.002 .. 80 (Karras et al. 2022, Table 1)
        sigma_min=max(float(outer.get("sigma_min", 0)), 0.002),
        sigma_max=min(float(outer.get("sigma_max", 80)), 80.0),
        sigma_data=float(outer.get("sigma_data", 0.5)),
        tensors=state_dict(model),
    )


def _read_converted(path: Path) -> Snapshot:
    metadata = read_metadata(path)
    check_format(path, metadata, _FORMAT)
    return Snapshot(tensors=load_file(path), **json.loads(metadata["snapshot"]))


def convert(source: str | Path, target: str | Path) -> Path:
    """Writes a snapshot as safetensors: tensors, and its arguments as JSON in the header."""
    snapshot, target = read_snapshot(source), Path(target)
    snapshot.network()  # refuses what could not be used later
    described = {k: v for k, v in vars(snapshot).items() if k != "tensors"}
    metadata = {**stamp(_FORMAT), "snapshot": json.dumps(described)}
    with replacing(target) as partial:
        save_file({k: v.contiguous() for k, v in snapshot.tensors.items()}, partial, metadata)
    return target


def load_edm(
    path: str | Path, *, features: str | None = None, dtype: torch.dtype = torch.float32
) -> Denoiser:
    """A denoiser of an EDM snapshot; ``class_labels`` are indices ``[B]`` or one-hot rows.

    Args:
        path: ``.pkl`` or converted ``.safetensors``.
        features: bottleneck module for DLMS, e.g. ``"enc.8x8_block3"``.
        dtype: of the network's weights; state and history stay float32.
    """
    snapshot = read_snapshot(path)
    process = EDM(snapshot.sigma_min, snapshot.sigma_max)
    network = snapshot.network().to(dtype)
    return Denoiser(network, process, "edm", sigma_data=snapshot.sigma_data, features=features)


__all__ = ["Snapshot", "UnsafeCheckpointError", "convert", "load_edm", "read_snapshot"]

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dlms_engine.checkpoints.edm SNAPSHOT.pkl OUT.safetensors")
    print(convert(sys.argv[1], sys.argv[2]))

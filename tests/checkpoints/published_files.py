"""Files as the published code of AMED, DyWeight, EPD, GAS and LD3 writes them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_edm import EasyDict, Persistent
from torch import Tensor, nn


def sampler_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules whose functions the loss in a snapshot names; the reader must not import them."""
    for module, names in {
        "solvers": ("dyweight", "epd", "ipndm", "heun", "dpm"),
        "solvers_amed": ("amed", "euler", "ipndm", "dpm_2", "dpm_pp", "heun"),
    }.items():
        made = ModuleType(module)
        for name in names:
            function = lambda *_, **__: pytest.fail("a named sampler was called")  # noqa: E731
            function.__module__, function.__qualname__ = module, f"{name}_sampler"
            function.__name__ = f"{name}_sampler"
            setattr(made, f"{name}_sampler", function)
        monkeypatch.setitem(sys.modules, module, made)


def persistent(
    kind: str,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    *,
    buffers: dict[str, Tensor] | None = None,
    modules: dict[str, Any] | None = None,
) -> Persistent:
    """A module of the persistence decorator: its state and its constructor's arguments."""
    state = {
        "training": False,
        "_parameters": {k: nn.Parameter(v, requires_grad=False) for k, v in tensors.items()},
        "_buffers": buffers or {},
        "_non_persistent_buffers_set": set(),
        "_modules": modules or {},
        **settings,
        "_init_args": (),
        "_init_kwargs": EasyDict(settings),
    }
    return Persistent(kind, state)


def write(path: Path, held: Any) -> Path:
    path.write_bytes(pickle.dumps(held))
    return path


def loss(kind: str, student: str, **settings: Any) -> Persistent:
    module = "solvers_amed" if kind == "AMED_loss" else "solvers"
    state = {
        "solver_stu": getattr(sys.modules[module], f"{student}_sampler"),
        "solver_tea": sys.modules[module].heun_sampler,
        "buffer_model": [torch.zeros(1, 2)],
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        **settings,
    }
    return Persistent(kind, state)


def dyweight_file(path: Path, weights: Tensor, scales: Tensor | None, **settings: Any) -> Path:
    """``exps/*/network-snapshot-*.pkl``."""
    rows = len(weights)
    own = {"num_steps": rows + 1, "afs": False, "guidance_rate": 0.0, "guidance_type": None}
    grid = {"schedule_type": "polynomial", "schedule_rho": 7.0, "dataset_name": "cifar10"}
    own |= {k: v for k, v in settings.items() if k not in grid}
    grid |= {k: v for k, v in settings.items() if k in grid}
    tensors = {"hybrid_weights": weights} | ({} if scales is None else {"t_scale": scales})
    mask = {"mask": torch.tril(torch.ones(rows, rows))}
    predictor = persistent("DyWeight_predictor", tensors, own, buffers=mask)
    return write(
        path, {"predictor": predictor, "loss_fn": loss("DyWeight_loss", "dyweight", **grid)}
    )


def dyweight_flow_file(path: Path, weights: Tensor, scales: Tensor) -> Path:
    """``dyweight_flux/checkpoints/dyweight_nfe*.pt``."""
    rows = len(weights)
    held = {
        "window_size": 2,
        "dyweight_weights_raw": weights,
        "dyweight_t_scales": scales,
        "dyweight_meta": {"K": rows, "tscale_low": 0.5, "tscale_high": 1.5},
        "dyweight_params": {"theta": weights, "phi": torch.zeros(rows)},
    }
    torch.save(held, path)
    return path


def epd_file(path: Path, parameters: dict[str, Tensor], **settings: Any) -> Path:
    """``exps/*/network-snapshot-*.pkl``, also without a loss, as exported after fine-tuning."""
    steps, points = parameters["r_params"].shape
    own = {
        "dataset_name": "cifar10", "num_steps": steps + 1, "num_points": points,
        "sampler_stu": "epd", "sampler_tea": "heun", "M": 3, "guidance_type": None,
        "guidance_rate": 0.0, "schedule_type": "time_uniform", "schedule_rho": 1.0, "afs": False,
        "scale_dir": 0.05, "scale_time": 0.2, "max_order": 3, "predict_x0": True,
        "lower_order_final": True, "fcn": False, "alpha": 10.0, **settings,
    }  # fmt: skip
    modules = {"sigmoid": nn.Sigmoid(), "softmax": nn.Softmax(dim=-1)}
    held = {"model": persistent("EPD_predictor", parameters, own, modules=modules)}
    if "backend" not in settings:
        held["loss_fn"] = loss("EPD_loss", own["sampler_stu"])
    return write(path, held)


def amed_file(path: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """``exps/*/network-snapshot-*.pkl``: layers are modules of their own."""
    layers: dict[str, Any] = {
        "map_noise": persistent("PositionalEmbedding", {}, {"endpoint": True})
    }
    for name in dict.fromkeys(key.partition(".")[0] for key in tensors):
        own = {part: tensors[f"{name}.{part}"] for part in ("weight", "bias")}
        layers[name] = persistent("Linear", own, {"in_features": own["weight"].shape[1]})
    defaults = {
        "dataset_name": "cifar10", "num_steps": 4, "sampler_stu": "amed", "sampler_tea": "heun",
        "M": 1, "guidance_type": None, "guidance_rate": None, "schedule_type": "polynomial",
        "schedule_rho": 7.0, "afs": False, "scale_dir": 0.01, "scale_time": 0.2, "max_order": 4,
        "predict_x0": True, "lower_order_final": True,
    }  # fmt: skip
    modules = layers | {"sigmoid": nn.Sigmoid()}
    model = persistent("AMED_predictor", {}, defaults | settings, modules=modules)
    return write(path, {"model": model, "loss_fn": loss("AMED_loss", "amed")})


def ld3_file(path: Path, grid: Tensor, network: Tensor) -> Path:
    """``best_v2.pt`` of the trainer."""
    count = len(grid)
    held = {"params1": torch.ones(count), "params2": torch.zeros(count)}
    torch.save({**held, "best_t_steps": torch.cat([grid, network])}, path)
    return path


def gas_file(path: Path, parameters: list[Tensor]) -> Path:
    """``checkpoints/*/N.pt``: moving averages as torch_ema keeps them, parameters, optimizer."""
    held = [nn.Parameter(value + 1) for value in parameters]  # of the last step, not the averages
    optimizer = {"state": {0: {"step": torch.tensor(10.0)}}, "param_groups": [{"lr": 1e-3}]}
    averages = {
        "decay": 0.999,
        "num_updates": 10,
        "shadow_params": parameters,
        "collected_params": None,
    }
    kept = {"ema": averages, "model": held, "optim": optimizer, "step": 10}
    torch.save(kept, path)
    return path

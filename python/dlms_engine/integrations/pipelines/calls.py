"""One network call of a pipeline, taken apart: where it goes, its arguments, its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .situation import remembers

SMALL = 1 << 16  # numbers in an argument that may follow the steps: times, not residuals


class NotReplayed(RuntimeError):
    """The engine's loop would not do what the pipeline does; the message says why."""


@dataclass(frozen=True)
class Slot:
    """Calls that are alike: one module, one place among its calls in a step, one signature."""

    module: int
    place: int
    tree: str

    def name(self, names: list[str]) -> str:
        """For messages: the component's name."""
        return names[self.module]


@dataclass
class Call:
    """A call while it is looked at: leaves of ``(args, kwargs)`` with their names."""

    slot: Slot
    spec: Any
    paths: list[str]
    leaves: list[Any]
    outputs: list[Tensor]
    output_leaves: list[Any]
    output_spec: Any


def take_apart(
    module: int, place: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Call:
    """The call of component number ``module``, its ``place``-th in this step."""
    found, spec = pytree.tree_flatten_with_path((args, kwargs))
    paths = [path_name(path) for path, _ in found]
    leaves = [leaf for _, leaf in found]
    output_leaves, output_spec = pytree.tree_flatten(output)
    tensors = [
        leaf for leaf in output_leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    slot = Slot(module, place, str(spec))
    return Call(slot, spec, paths, leaves, tensors, output_leaves, output_spec)


def path_name(path: Any) -> str:
    """``hidden_states``, ``added_cond_kwargs.text_embeds``, ``0`` from a pytree path."""
    keys = [getattr(key, "key", getattr(key, "idx", key)) for key in path]
    return ".".join(str(key) for key in keys[1:]) or "argument"


def rebuild(spec: Any, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` from their leaves."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def same(one: Any, other: Any) -> bool:
    """Whether two arguments that are not the same tensor are equal. Reads tensors."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
        )
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    try:
        return bool(one == other)
    except Exception:
        return False  # a comparison that fails or has no single answer is no equality


def is_value(leaf: Any) -> bool:
    """Whether an argument's value is all there is to it: a cache that is handed over is more."""
    kinds = (bool, int, float, complex, str, bytes, type(None), Enum, Tensor)
    torch_kinds = (torch.dtype, torch.device, torch.layout, torch.memory_format)
    return isinstance(leaf, kinds + torch_kinds)


def snapshot(leaf: Any) -> Any:
    """``leaf`` as it is now, whatever the pipeline does with its memory later."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def small(leaf: Any) -> bool:
    """Whether an argument may follow the steps."""
    if isinstance(leaf, Tensor):
        return leaf.numel() <= SMALL
    return isinstance(leaf, (int, float, bool))


def gram(columns: list[Tensor], target: Tensor) -> Tensor:
    """``[J + 1, J + 1]`` float64 scalar products of ``columns`` and, last, ``target``."""
    stacked = torch.stack([c.detach().reshape(-1).double() for c in (*columns, target)])
    return stacked @ stacked.T


def sliced_gram(columns: list[Tensor], sample: Tensor, target: Tensor) -> Tensor:
    """``gram`` where every slice along dimension 1 of every column has a weight of its own.

    The ``J`` columns of ``[B, C, ...]`` count as ``J * C``, slice by slice of each; ``sample`` stays one.
    """
    slices, many = sample.shape[1], len(columns)
    products = torch.zeros((many * slices + 2,) * 2, dtype=torch.float64)
    for c in range(slices):
        parts = [column[:, c] for column in (*columns, sample)]
        places = torch.tensor([*(j * slices + c for j in range(many)), -2, -1]) % len(products)
        products[places[:, None], places] += gram(parts, target[:, c]).cpu()
    return products


def solve_weights(products: Tensor) -> Tensor:
    """``[J]`` weights of the columns that come nearest to the target (CPU, float64)."""
    inner, right = products[:-1, :-1], products[:-1, -1:]
    return torch.linalg.lstsq(inner, right, driver="gelsd").solution[:, 0]


def misfit(products: Tensor, weights: Tensor) -> float:
    """How far the weighted columns are from the target, relative to what is added up."""
    extended = torch.cat([weights, -torch.ones(1, dtype=torch.float64)])
    left = float(extended @ products @ extended)
    scale = float((extended.abs() * products.diagonal().clamp(min=0).sqrt()).sum())
    return (max(left, 0.0) ** 0.5) / scale if scale else 0.0


def tolerance(*dtypes: torch.dtype) -> float:
    """Largest ``misfit`` that rounding in these dtypes explains, and that of its scalar products."""
    products = torch.finfo(torch.float64).eps ** 0.5  # a difference of numbers that nearly cancel
    return 4 * max(products, *(torch.finfo(dtype).eps for dtype in dtypes))


def caches(module: nn.Module) -> str | None:
    """What makes a module's output depend on its earlier calls; None if nothing is known to."""
    if getattr(module, "is_cache_enabled", False):
        return "a cache is enabled on it"
    if any(isinstance(p, nn.Dropout) and p.training and p.p > 0 for p in module.modules()):
        return "its dropout is active: it is in training mode"
    for name, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(hook, "_is_stateful", False):
                return f"{type(hook).__name__} on {name or 'it'} remembers earlier calls"
    return remembers(module)

"""What a pipeline tells its network about a list of prompts: found once, kept in a folder.

The pipeline itself encodes the prompts, a few at a time, and is stopped at its first network call;
the arguments of these calls, joined, are the conditioning. One file per group of prompts, so that an
interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...support.files import replacing
from ..scheduler.probe import ProbeLoop, first_argument
from .branch_calls import boundary_of, joined_branches, switched_branches
from .networks import network_of

_log = logging.getLogger("dlms_engine")
_FORMAT = "dlms_engine.prompts/3"
GROUP = 8  # prompts encoded together
Prove = Callable[["NetworkCall", dict[str, Any]], None]
WITHOUT_BATCH = ("txt_ids", "img_ids", "image_rotary_emb")


class _CapturedError(Exception):
    """Ends the pipeline's call at its first network evaluation."""


class _Capture(ProbeLoop):
    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.call = args, kwargs
        raise _CapturedError


@dataclass
class NetworkCall:
    """The first network call of a pipeline, for all prompts at once.

    Attributes:
        args, kwargs: tensors with a batch have ``branches * prompts`` rows, unconditional first.
        prompts: how many there are.
        branches: 2 with classifier-free guidance, else 1.
        guidance: its scale; None without.
        timestep: what the scheduler called the time of that call.
        scaled: whether the pipeline lets the scheduler scale the network's input, as an analytical
            first step needs.
        boundary: of two networks, the scheduler's time from which up the first is called.
        guidance_2: the second network's scale.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prompts: int
    branches: int
    guidance: float | None
    timestep: float
    scaled: bool
    boundary: float | None = None
    guidance_2: float | None = None


def is_batched(path: str, leaf: Any, count: int) -> bool:
    """Whether an argument has one row for each of ``count`` samples."""
    return (
        isinstance(leaf, Tensor)
        and leaf.ndim > 0
        and leaf.shape[0] == count
        and not any(name in path for name in WITHOUT_BATCH)
    )


def capture(pipe: Any, arguments: dict[str, Any]) -> NetworkCall:
    """Runs ``pipe(**arguments)`` up to its first network call and keeps that call's arguments.

    Raises:
        RuntimeError: the pipeline ended without calling its network.
    """
    boundary = boundary_of(pipe)
    if boundary is not None:
        return _switched(pipe, arguments, boundary)
    loop = _Capture(network_of(pipe))
    loop.install()
    try:
        with torch.no_grad():
            pipe(**arguments)
    except _CapturedError:
        pass
    finally:
        loop.uninstall()
    if loop.call is None:
        raise RuntimeError(f"{type(pipe).__name__} did not call its network")
    guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
    branches = 2 if guided else 1
    batch, count = first_argument(*loop.call).shape[0], _prompts_of(arguments)
    if count is not None and batch == count and (guided or _scaled_guidance(arguments)):
        return _separate(pipe, arguments, count)
    if batch % branches or (count is not None and batch != count * branches):
        raise ValueError(
            f"{type(pipe).__name__} calls its network with {batch} samples for {count} prompts and "
            f"{branches} guidance branches: distilling takes one row for each"
        )
    return NetworkCall(
        *loop.call,
        prompts=batch // branches,
        branches=branches,
        guidance=float(pipe.guidance_scale) if guided else None,
        timestep=float(pipe.scheduler.timesteps.tolist()[0]),
        scaled=pipe.scheduler.scaled_input,
    )


def _prompts_of(arguments: dict[str, Any]) -> int | None:
    """How many prompts a call is for; None where it does not say."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    embeds = arguments.get("prompt_embeds")
    return int(embeds.shape[0]) if isinstance(embeds, Tensor) else None


def _scaled_guidance(arguments: dict[str, Any]) -> bool:
    """Guidance across calls that a pipeline does not call classifier-free guidance."""
    true_scale = arguments.get("true_cfg_scale")
    return isinstance(true_scale, (int, float)) and true_scale > 1


def _separate(pipe: Any, arguments: dict[str, Any], count: int) -> NetworkCall:
    """The call of a pipeline that calls its network once per branch, for both of them."""
    args, kwargs, guidance = joined_branches(pipe, arguments, count)
    return NetworkCall(
        args,
        kwargs,
        prompts=count,
        branches=2,
        guidance=guidance,
        timestep=float(pipe.scheduler.timesteps.tolist()[0]),
        scaled=pipe.scheduler.scaled_input,
    )


def _switched(pipe: Any, arguments: dict[str, Any], boundary: float) -> NetworkCall:
    """The call of a pipeline with a network for early and one for late times."""
    count = _prompts_of(arguments)
    if count is None:
        raise ValueError(f"{type(pipe).__name__} with two networks needs prompts or prompt_embeds")
    args, kwargs, scales = switched_branches(pipe, arguments, count, boundary)
    return NetworkCall(
        args,
        kwargs,
        prompts=count,
        branches=2 if scales[0] is not None else 1,
        guidance=scales[0],
        timestep=float(pipe.scheduler.timesteps.tolist()[0]),
        scaled=pipe.scheduler.scaled_input,
        boundary=boundary,
        guidance_2=scales[1],
    )


def prompt_calls(
    pipe: Any,
    prompts: Sequence[str] | None,
    arguments: dict[str, Any],
    folder: str | Path | None = None,
    prove: Prove = lambda call, arguments: None,
) -> NetworkCall:
    """The joined call for all prompts; read from ``folder`` where it is there already.

    Args:
        pipe: a loaded pipeline.
        prompts: None for unconditional pipelines, or with embeddings among the arguments.
        arguments: for the pipeline's call.
        folder: made if missing. Files of other prompts, arguments or text encoders are not used.
        prove: is given the first group's call and the pipeline's arguments where the call is made anew.
    """
    store = Path(folder) if folder is not None else None
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
    parts = [
        _one(pipe, {**arguments, **group}, store, number, prove)
        for number, group in enumerate(_groups(prompts, arguments))
    ]
    return join(parts)


def _groups(prompts: Sequence[str] | None, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments of each group; ``negative_prompt`` is one text, or one per prompt."""
    if prompts is None:
        yield {}
        return
    negative = arguments.get("negative_prompt")
    each = list(negative) if isinstance(negative, list | tuple) else None
    if each is not None and len(each) != len(prompts):
        raise ValueError(f"{len(each)} negative prompts for {len(prompts)} prompts")
    for start in range(0, len(prompts), GROUP):
        chosen = list(prompts[start : start + GROUP])
        group: dict[str, Any] = {"prompt": chosen}
        if negative is not None:
            group["negative_prompt"] = (
                [negative] * len(chosen) if each is None else each[start : start + GROUP]
            )
        yield group


def _one(
    pipe: Any, arguments: dict[str, Any], store: Path | None, number: int, prove: Prove
) -> NetworkCall:
    def made() -> NetworkCall:
        call = capture(pipe, arguments)
        if number == 0:
            prove(call, arguments)
        return call

    if store is None:
        return made()
    key = _fingerprint(pipe, arguments)
    path = store / f"prompts-{number:05d}.safetensors"
    found = _read(path, key)
    if found is None:
        found = made()
        _write(path, key, found)
    return found


# -- joining -------------------------------------------------------------------------------------


def join(parts: Sequence[NetworkCall]) -> NetworkCall:
    """One call for the prompts of all ``parts``, in order.

    Raises:
        ValueError: the calls differ in more than their batch.
    """
    first = parts[0]
    flat = [pytree.tree_flatten_with_path((part.args, part.kwargs)) for part in parts]
    if any(spec != flat[0][1] for _, spec in flat):
        raise ValueError("the pipeline calls its network differently for different prompts")
    total = sum(part.prompts for part in parts)
    sample = first_argument(first.args, first.kwargs)
    leaves: list[Any] = []
    for column in zip(*(found for found, _ in flat), strict=True):
        path = str(column[0][0])
        values = [value for _, value in column]
        if values[0] is sample:  # only its shape is used
            leaves.append(sample[:1].expand(total * first.branches, *sample.shape[1:]))
        elif all(
            is_batched(path, value, part.branches * part.prompts)
            for value, part in zip(values, parts, strict=True)
        ):
            leaves.append(_stacked(values, first.branches))
        else:
            leaves.append(values[0])
    args, kwargs = pytree.tree_unflatten(leaves, flat[0][1])
    return replace(first, args=args, kwargs=kwargs, prompts=total)


def _stacked(values: list[Tensor], branches: int) -> Tensor:
    split = [value.reshape(branches, -1, *value.shape[1:]) for value in values]
    return torch.cat(split, dim=1).flatten(0, 1)


# -- files ---------------------------------------------------------------------------------------


def _fingerprint(pipe: Any, arguments: dict[str, Any]) -> str:
    """Changes with the prompts, the arguments and the text encoders' weights."""
    total = hashlib.sha256(f"{type(pipe).__name__} {boundary_of(pipe)}".encode())
    for name in sorted(arguments):
        total.update(name.encode())
        value = arguments[name]
        if isinstance(value, Tensor):
            total.update(value.detach().float().contiguous().cpu().numpy().tobytes())
        else:
            total.update(repr(value).encode())
    for name, part in sorted(pipe.components.items()):
        if not name.startswith("text_encoder") or not isinstance(part, nn.Module):
            continue
        for key, value in part.named_parameters():
            some = value.detach().reshape(-1)[:16].float().cpu().tolist()
            total.update(f"{name}.{key}{tuple(value.shape)}{some}".encode())
    return total.hexdigest()


def _write(path: Path, key: str, call: NetworkCall) -> None:
    """Atomic; a call with arguments that JSON cannot say is not kept."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    sample = first_argument(call.args, call.kwargs)
    tensors: dict[str, Tensor] = {}
    plain: list[Any] = []
    for i, leaf in enumerate(leaves):
        if leaf is sample:
            plain.append({"sample": list(leaf.shape), "dtype": str(leaf.dtype)})
        elif isinstance(leaf, Tensor):
            plain.append({"tensor": i})
            tensors[f"leaf{i}"] = leaf.detach().cpu().contiguous().clone()
        else:
            plain.append({"value": leaf})
    rest = {k: v for k, v in vars(call).items() if k not in ("args", "kwargs")}
    try:
        described = json.dumps(
            {"key": key, "leaves": plain, "tree": pytree.treespec_dumps(spec), "rest": rest}
        )
    except (TypeError, ValueError, NotImplementedError) as exc:
        _log.info("the prompts' embeddings are not kept: %s", exc)
        return
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": _FORMAT, "call": described})


def _read(path: Path, key: str) -> NetworkCall | None:
    """What ``_write`` wrote under ``key``; None for anything else, which is then made anew."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
        described = json.loads(metadata["call"])
        if metadata.get("format") != _FORMAT or described["key"] != key:
            _log.info("%s is of other prompts or encoders: made anew", path)
            return None
        tensors = load_file(path)
        leaves = [_leaf(plain, tensors) for plain in described["leaves"]]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(described["tree"]))
        return NetworkCall(args, kwargs, **described["rest"])
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as exc:
        _log.warning("%s cannot be read (%s): made anew", path, exc)
        return None


def _leaf(plain: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "sample" in plain:
        dtype = getattr(torch, plain["dtype"].removeprefix("torch."))
        return torch.zeros(1, dtype=dtype).expand(plain["sample"])
    return tensors[f"leaf{plain['tensor']}"] if "tensor" in plain else plain["value"]

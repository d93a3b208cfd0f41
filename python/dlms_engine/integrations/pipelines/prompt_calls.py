"""What a pipeline tells its networks about a list of prompts: found once, kept in a folder.

The pipeline itself encodes the prompts, a few at a time; the arguments of its networks' calls are the
conditioning. One file per group of prompts, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...support.files import replacing
from .branch_calls import Recording
from .forms import Packing
from .program_calls import OneByOne, boundary_of
from .step_calls import NetworkCall, StepCalls, join

_log = logging.getLogger("dlms_engine")
_FORMAT = "dlms_engine.prompts/4"
GROUP = 8  # prompts encoded together
ENCODERS = ("text_encoder", "image_encoder", "vae")  # components a call's arguments are made by
Prove = Callable[[StepCalls, dict[str, Any]], None]


def prompt_calls(
    pipe: Any,
    prompts: Sequence[str] | None,
    arguments: dict[str, Any],
    folder: str | Path | None = None,
    prove: Prove = lambda call, arguments: None,
) -> StepCalls:
    """The joined calls for all prompts; read from ``folder`` where it is there already.

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
    recording = Recording(pipe)
    parts = [
        _one(recording, {**arguments, **group}, store, number, prove)
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
    recording: Recording,
    arguments: dict[str, Any],
    store: Path | None,
    number: int,
    prove: Prove,
) -> StepCalls:
    def made() -> StepCalls:
        call = capture(recording, arguments)
        if number == 0:
            prove(call, arguments)
        return call

    if store is None:
        return made()
    key = _fingerprint(recording.pipe, arguments)
    path = store / f"prompts-{number:05d}.safetensors"
    found = _read(path, key)
    if found is None:
        found = made()
        _write(path, key, found)
    return found


def capture(recording: Recording, arguments: dict[str, Any]) -> StepCalls:
    """The calls of a step for the prompts among ``arguments``: together, or one by one.

    Raises:
        ValueError: the pipeline cannot be distilled for.
    """
    try:
        return recording.step_calls(arguments)
    except OneByOne as exc:
        texts = arguments.get("prompt")
        if not isinstance(texts, list) or len(texts) < 2:
            name = type(recording.pipe).__name__
            raise ValueError(
                f"{name} cannot be distilled for with several samples at once: {exc}; pass prompts, "
                "which are then encoded one by one, or the embeddings of one"
            ) from exc
        negative = arguments.get("negative_prompt")
        each = negative if isinstance(negative, list) else [negative] * len(texts)
        alone: list[dict[str, Any]] = [{"prompt": [text]} for text in texts]
        if negative is not None:
            alone = [one | {"negative_prompt": [n]} for one, n in zip(alone, each, strict=True)]
        return join([recording.step_calls({**arguments, **one}) for one in alone])


# -- files ---------------------------------------------------------------------------------------


def _fingerprint(pipe: Any, arguments: dict[str, Any]) -> str:
    """Changes with the prompts, the arguments, images among them, and the encoders' weights."""
    total = hashlib.sha256(f"{type(pipe).__name__} {boundary_of(pipe)}".encode())
    for name in sorted(arguments):
        total.update(name.encode())
        for part in _bytes_of(arguments[name]):
            total.update(part)
    for name, part in sorted(pipe.components.items()):
        if not name.startswith(ENCODERS) or not isinstance(part, nn.Module):
            continue
        for key, value in part.named_parameters():
            some = value.detach().reshape(-1)[:16].float().cpu().tolist()
            total.update(f"{name}.{key}{tuple(value.shape)}{some}".encode())
    return total.hexdigest()


def _bytes_of(value: Any) -> Iterator[bytes]:
    """All of an argument: ``repr`` leaves out the middle of an array, and an image's pixels."""
    if isinstance(value, Tensor):
        yield value.detach().float().contiguous().cpu().numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)}".encode()
        for part in value:
            yield from _bytes_of(part)
    elif callable(getattr(value, "tobytes", None)):  # of NumPy or PIL
        shape = getattr(value, "shape", getattr(value, "size", ""))
        kind = getattr(value, "dtype", getattr(value, "mode", ""))
        yield f"{type(value).__name__} {shape} {kind}".encode()
        yield value.tobytes()
    else:
        yield repr(value).encode()


def _write(path: Path, key: str, found: StepCalls) -> None:
    """Atomic; calls with arguments that JSON cannot say are not kept."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return {"value": leaf}
        name = names.setdefault(id(leaf), f"leaf{len(names)}")
        tensors[name] = leaf.detach().cpu().contiguous().clone()
        return {"tensor": name}

    try:
        calls = [
            {
                **vars(call),
                "spec": pytree.treespec_dumps(call.spec),
                "forms": {i: vars(form) for i, form in call.forms.items()},
                "times": {i: [plain(part) for part in form] for i, form in call.times.items()},
                "columns": [vars(call.columns[0]), call.columns[1]],
            }
            for call in found.calls
        ]
        samples = [[[plain(leaf) for leaf in one] for one in sample] for sample in found.samples]
        rest = {**vars(found), "calls": calls, "samples": samples}
        described = json.dumps({"key": key, "calls": rest})
    except (TypeError, ValueError, NotImplementedError) as exc:
        _log.info("the prompts' embeddings are not kept: %s", exc)
        return
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": _FORMAT, "call": described})


def _read(path: Path, key: str) -> StepCalls | None:
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
        tensors, rest = load_file(path), described["calls"]

        def leaf(plain: dict[str, Any]) -> Any:
            return tensors[plain["tensor"]] if "tensor" in plain else plain["value"]

        rest["calls"] = [_call(call, leaf) for call in rest["calls"]]
        rest["samples"] = [[[leaf(p) for p in one] for one in sample] for sample in rest["samples"]]
        return StepCalls(**{**rest, "shape": tuple(rest["shape"])})
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as exc:
        _log.warning("%s cannot be read (%s): made anew", path, exc)
        return None


def _call(kept: dict[str, Any], leaf: Callable[[dict[str, Any]], Any]) -> NetworkCall:
    form, per_sample = kept["columns"]
    return NetworkCall(
        **{
            **kept,
            "spec": pytree.treespec_loads(kept["spec"]),
            "forms": {int(i): _packing(form) for i, form in kept["forms"].items()},
            "times": {int(i): (leaf(a), leaf(b)) for i, (a, b) in kept["times"].items()},
            "columns": (_packing(form), bool(per_sample)),
        }
    )


def _packing(kept: dict[str, Any]) -> Packing:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    return Packing(**values)

"""In words, why torch could not export or compile a sampler."""

from __future__ import annotations

import re

_REASONS = (
    (
        ("data-dependent", "datadependent", "could not guard", ".item()", "could not extract"),
        "the network's Python depends on a tensor's value (an `if` on it, .item(), .tolist()): "
        "write it with torch.where or torch.cond",
    ),
    (
        ("constraints violated", "specialized", "not equal to the batch", "marked as dynamic"),
        "the network fixes the batch size (a number taken from a shape): pass dynamic_batch=False, "
        "which makes a package for the example's batch alone",
    ),
    (
        ("c++ compile", "cppcompileerror", "compiler is not found", "invalidcxxcompiler"),
        "AOTInductor needs a working C++ compiler: install g++ or clang++, or set CXX",
    ),
)


_SUGGESTED = re.compile(r"batch = Dim\('batch', (?:min=\d+, )?max=(\d+)\)")


def explain_export(exc: BaseException) -> str:
    """In words, why an export failed with ``exc``."""
    text = f"{type(exc).__name__}: {exc}".lower()
    suggested = suggested_batch(exc)
    if suggested is not None:
        return (
            f"the network takes another path for more than {suggested} samples: pass "
            f"max_batch={suggested}"
        )
    first = (str(exc).strip() or "no message").splitlines()[0]
    cause = f"{type(exc).__name__}: {first}"
    for fragments, reason in _REASONS:
        if any(fragment in text for fragment in fragments):
            return f"{reason} ({cause})"
    return f"it failed with {cause}"


def suggested_batch(exc: BaseException) -> int | None:
    """The largest batch that one program can serve, if ``exc`` names it."""
    found = _SUGGESTED.search(str(exc))
    return None if found is None else int(found[1])

"""Makes every optional dependency look as if it were not installed: a pytest plugin, and importable.

python -m pytest -p without_extras tests/engine/test_sampler.py ...     (with tests/ on PYTHONPATH)
"""

from __future__ import annotations

import sys
from typing import Any

# every package that only an extra brings, and what those bring
EXTRAS = (
    "PIL", "accelerate", "diffusers", "huggingface_hub", "k_diffusion", "lpips", "matplotlib", "mkdocs",
    "mlflow", "onnx", "peft", "scipy", "tensorboard", "tokenizers", "torch_fidelity", "torchmetrics",
    "torchvision", "transformers", "wandb", "yaml",
)  # fmt: skip


class Filtered:
    """A finder that does not find ``EXTRAS``, which is what a package that is not there looks like."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, *rest: Any) -> Any:
        return None if name.partition(".")[0] in EXTRAS else self.finder.find_spec(name, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def block() -> None:
    """From now on the extras cannot be imported.

    Raises:
        RuntimeError: one is imported already, so that blocking it would show nothing.
    """
    there = sorted({name.partition(".")[0] for name in sys.modules} & set(EXTRAS))
    if there:
        raise RuntimeError(f"{', '.join(there)} imported before they were blocked")
    sys.meta_path[:] = [Filtered(finder) for finder in sys.meta_path]


if "pytest" in sys.modules and "without_extras" in sys.argv:
    block()

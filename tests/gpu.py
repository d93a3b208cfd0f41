"""What ``needs_cuda`` means, and where Triton runs."""

from __future__ import annotations

import os

import pytest
import torch


def require_cuda() -> None:
    """Skip without a GPU, or fail under DLMS_REQUIRE_CUDA=1."""
    if torch.cuda.is_available():
        return
    if os.environ.get("DLMS_REQUIRE_CUDA") == "1":
        pytest.fail("DLMS_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs an NVIDIA GPU: torch sees no CUDA device")


def triton_device() -> str:
    """Where Triton kernels run: the CPU under the interpreter, else a GPU, or the test is skipped."""
    from dlms_engine import kernels

    if kernels.triton_reason() is not None:
        pytest.skip(str(kernels.triton_reason()))
    if kernels.interpreted():
        return "cpu"
    require_cuda()
    return "cuda"

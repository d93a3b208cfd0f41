"""Freed memory that stays while a network runs, and goes back afterwards."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

from dlms_engine.support.allocator import freed_memory_kept

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")

RUN = """
import json, resource, torch
from dlms_engine.support.allocator import freed_memory_kept

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def layers():
    # 40 MiB: above 32, glibc maps every one for itself, whatever was freed before
    x = torch.ones(40 << 18)
    del x
    before = faults()
    for _ in range(10):
        x = torch.ones(40 << 18)
        del x
    return faults() - before

free, small = layers(), resident()
with freed_memory_kept():
    with freed_memory_kept():
        layers()
    kept, large = layers(), resident()
print(json.dumps([free, kept, small, large, resident()]))
"""


def run(**environment: str) -> list[float]:
    held = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    made = subprocess.run(
        [sys.executable, "-c", RUN], env={**held, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[float] = json.loads(made.stdout)
    return found


@glibc
def test_pages_are_faulted_in_once_and_given_back() -> None:
    free, kept, small, large, again = run()
    assert free > 100_000  # planted: as glibc does it, ten times 10,240 pages
    assert kept < free / 20
    assert large > small + 20 and again < small + 10


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_the_allocator_holds(name: str) -> None:
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    free, kept, *_ = run(**{name: value})
    assert kept > free / 2 > 1000


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Without ``mallopt``, as musl's and macOS's."""

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Other())
    with freed_memory_kept():
        pass

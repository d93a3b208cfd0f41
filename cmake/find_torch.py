"""Prints the folder of the torch package of this interpreter's environment, or nothing."""

import importlib.util
import os
import sys
import sysconfig


def candidates():
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        yield from spec.submodule_search_locations
    # pip's build isolation takes these out of sys.path; the prefix still tells where they are.
    for name in ("purelib", "platlib"):
        yield os.path.join(sysconfig.get_path(name), "torch")
    # Front ends that build in an environment of their own name the target's here.
    if "VIRTUAL_ENV" in os.environ:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield os.path.join(os.environ["VIRTUAL_ENV"], "lib", version, "site-packages", "torch")


for folder in candidates():
    if os.path.isfile(os.path.join(folder, "version.py")) and os.path.isdir(
        os.path.join(folder, "include")
    ):
        print(os.path.abspath(folder))
        break

"""The stand-in device is for good once it is there: its tests have a process of their own."""

from __future__ import annotations

import os

ALONE = os.environ.get("DLMS_FAKE_DEVICE") == "1"
collect_ignore = ["test_fake_device.py"] if ALONE else ["test_paths.py", "test_planted.py"]
if ALONE:
    from fake_device import standin

    standin.register()

"""Values for JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dlms_engine.support.values import json_value


def test_json_has_no_word_for_what_is_not_finite() -> None:
    held = {
        "a": math.nan,
        3: [1.0, (math.inf, -math.inf, None)],
        "path": Path("x") / "y",
        "b": True,
    }
    plain = json_value(held)
    assert plain == {"a": None, "3": [1.0, [None, None, None]], "path": str(Path("x/y")), "b": True}
    json.dumps(plain, allow_nan=False)

"""Long runs that look for what short tests miss; each prints its figures and exits 0 if all is right.

    python scripts/endurance kills 200        commands killed at random moments and called again
    python scripts/endurance pairs 6          commands twice at once in one folder
    python scripts/endurance threads 10000    calls from four threads with changing shapes
    python scripts/endurance damaged 50000    damaged solver files, and a fiftieth as many crafted pickles

``kills 40 auto ld3`` takes these commands alone. The seeds are fixed; the moments of the kills are
those of the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

from damaged import damaged  # noqa: E402
from kills import COMMANDS, SHARING, kills, pairs  # noqa: E402
from threads import threads  # noqa: E402

FAULTS = ("different", "died", "grew", "untyped", "executed", "over 1 s or 200 MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kills", "pairs", "threads", "damaged"))
    parser.add_argument("count", type=int)
    parser.add_argument(
        "names", nargs="*", choices=[*COMMANDS, []], help="of commands, for kills and pairs"
    )
    chosen = parser.parse_args()
    if chosen.what == "kills":
        found = kills(chosen.count, chosen.names or COMMANDS)
    elif chosen.what == "pairs":
        found = pairs(chosen.count, chosen.names or SHARING)
    else:
        found = {"threads": threads, "damaged": damaged}[chosen.what](chosen.count)
    print(json.dumps(found, indent=1))
    return int(any(found.get(fault) for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())

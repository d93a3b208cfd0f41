"""``python -m dlms_engine``: the command line; under ``torchrun`` every rank takes its share."""

from __future__ import annotations

from .cli import main
from .parallel import finish, initialise

if __name__ == "__main__":
    initialise()
    try:
        main()
    finally:
        finish()

"""``python -m dlms_engine`` is the ``dlms`` command."""

from .cli import main

main()

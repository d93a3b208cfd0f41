"""Benchmarks: `dlms bench step`, or `python -m dlms_engine.lab.bench step`."""

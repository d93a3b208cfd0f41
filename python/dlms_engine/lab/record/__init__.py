"""The record of samplers on the embedded and on the benchmark model."""

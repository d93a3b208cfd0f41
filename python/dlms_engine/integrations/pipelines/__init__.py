"""Whole pipelines: what they call per step, their loops in the engine, distilling for them."""

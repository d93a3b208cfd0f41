"""Solver tables: the rows of a sampler, how they are traced, and the file they live in."""

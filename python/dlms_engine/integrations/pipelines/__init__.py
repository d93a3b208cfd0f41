"""Solvers distilled inside diffusers pipelines."""

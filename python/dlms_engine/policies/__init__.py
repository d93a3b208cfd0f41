"""Samplers that compute their rows while they run, and what distillation returns."""

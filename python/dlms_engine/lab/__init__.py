"""The laboratory: benchmarks, comparisons, records and plots. Only the command line uses it."""

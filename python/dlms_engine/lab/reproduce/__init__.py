"""The papers' tables, made again: what was published, which files it takes, and the run."""

"""Other repositories' checkpoint files, read without executing pickled code."""

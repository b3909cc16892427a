"""A model as it was loaded becomes a directory that loads again: `runner convert`."""

from runner.models.load import quieten_transformers

# Every module of this package imports mlx-lm, and that transformers.
quieten_transformers()

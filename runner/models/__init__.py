"""A name becomes weights and a tokenizer; `load` is the way in.

Importing this package does not import mlx: on Linux the BLAS has to be in place before that.
"""

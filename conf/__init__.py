"""The configuration tree: one folder per group, one file per choice."""

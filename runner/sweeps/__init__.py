"""Sweeps: what the points of one say, alone and against one another."""

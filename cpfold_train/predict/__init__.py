"""Structures from a checkpoint: what a user gives, sampled on a grid of ranks, written as files and pictures."""

PRECISIONS = ("32-true", "bf16-mixed", "64-true")
"""Of a prediction; the first is the default."""

"""Checkpoints: reading, writing and converting them."""

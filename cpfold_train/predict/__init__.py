"""Structures from a checkpoint: what a user gives, sampled on a grid of ranks, written as files and pictures."""

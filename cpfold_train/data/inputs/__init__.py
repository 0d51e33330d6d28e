"""Inputs of a prediction."""

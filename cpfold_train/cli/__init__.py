"""The commands, and what wires a run together."""

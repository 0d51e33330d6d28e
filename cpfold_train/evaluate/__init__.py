"""How good predicted structures are, by the truth."""

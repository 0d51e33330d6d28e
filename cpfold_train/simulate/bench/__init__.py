"""Single ops as benchmark cases."""

"""Features of a crop."""

"""Shards to batches: sampling, cropping, loading."""

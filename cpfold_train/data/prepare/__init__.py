"""From structure files and alignments to shards."""

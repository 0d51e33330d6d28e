"""Looking at the samples of shards."""

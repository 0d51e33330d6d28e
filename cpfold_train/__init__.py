"""Fine-tune co-folding models on very large protein crops, one sample sharded over a 2D grid of ranks."""

__version__ = "0.1.0"

"""Fine-tune co-folding models on very large protein crops, one sample sharded over a 2D grid of ranks."""

__version__ = "0.1.0"
VERSION = f"cpfold-train {__version__}"
"""What ``--version`` of every command says."""

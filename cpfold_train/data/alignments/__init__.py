"""Multiple sequence alignments."""

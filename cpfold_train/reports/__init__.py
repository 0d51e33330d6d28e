"""What a run reports: names of its metrics, files, plots, comparisons. Nothing here needs torch or Lightning."""

"""The command that proves and measures a machine's GPUs: results equal to those of a CPU, and what the card reaches."""

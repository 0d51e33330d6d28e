"""What a user asks to predict: structure files, sequences and hints."""

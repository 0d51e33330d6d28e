"""One rank of a step without contents: a tracer that counts memory, work and messages."""

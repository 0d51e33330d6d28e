"""The benchmark command: what an op costs, on real ranks or as one rank of a simulated world."""

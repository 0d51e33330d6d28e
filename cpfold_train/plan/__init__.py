"""What a run will need, before it is started: memory, communication, arithmetic and time of a step on any grid."""

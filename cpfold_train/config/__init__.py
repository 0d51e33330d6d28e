"""The configuration: its schema, how it is composed, and what can be found wrong before anything starts."""

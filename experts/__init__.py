"""Which experts a token goes to, and which of them are in RAM."""

"""The settings of a run: their declaration, limits, reading and checking."""

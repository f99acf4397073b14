"""Evolution strategies: the algorithm."""

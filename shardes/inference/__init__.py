"""Generation, key-value cache, log-probabilities."""

"""What a run found, as data, and everything that is drawn from it."""

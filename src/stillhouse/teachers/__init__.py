"""Models that answer: where they come from, how they load, and their halves."""

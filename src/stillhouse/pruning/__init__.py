"""Makes a model smaller: fewer layers, narrower ones, fewer tokens; every layer alike."""

"""Makes a model smaller: fewer layers, narrower layers, fewer tokens; all layers have equal
sizes."""

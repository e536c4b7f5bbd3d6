"""Structured pruning: fewer layers, narrower layers, fewer tokens. All layers have the same
sizes."""

"""Estimates a run's memory, time, and disk usage before it starts, from configurations alone."""

"""Measurements of a run's models against the teacher: fidelity, speed, memory, text, tasks."""

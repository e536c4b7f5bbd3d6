"""Evaluation of a run's models against the teacher: fidelity, speed, memory, generated text, and
benchmark tasks."""

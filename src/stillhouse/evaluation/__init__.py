"""What a run's models kept of the teacher, measured: fidelity, speed, memory, text, tasks."""

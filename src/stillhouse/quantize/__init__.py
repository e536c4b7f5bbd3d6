"""The student in numbers of few bits: rounded as it is, or trained while it is rounded."""

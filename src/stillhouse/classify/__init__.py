"""Distills a teacher's judgment of texts into a small classifier."""

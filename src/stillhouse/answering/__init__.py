"""Trains a small language model to answer like a teacher: JSON with a schema, or free text."""

"""A small language model that answers as a teacher does: JSON by a schema, or free text."""

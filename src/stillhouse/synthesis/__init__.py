"""Text from teachers: prompts answered by an API or a local model, journaled and filtered."""

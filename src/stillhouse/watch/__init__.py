"""A live page of runs, and a chat with their models."""

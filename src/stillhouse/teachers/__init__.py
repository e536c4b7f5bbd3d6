"""Teachers: where models come from, how they load, and their backbone and head."""

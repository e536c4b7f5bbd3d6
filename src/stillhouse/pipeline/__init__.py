"""The engine of a run: each kind of run declares its steps, and every command goes through them."""

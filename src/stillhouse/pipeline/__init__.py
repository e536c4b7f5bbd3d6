"""The engine of a run: each kind of run declares its steps, and every command walks them."""

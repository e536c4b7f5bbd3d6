"""The engine of a run: a kind of run declares its steps, and every command walks them."""

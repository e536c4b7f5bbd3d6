"""Side-by-side measurements; each writes bench/results/NAME.json."""

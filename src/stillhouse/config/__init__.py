"""One YAML file that says everything about one run."""

"""Recipes: one YAML file that defines one run."""

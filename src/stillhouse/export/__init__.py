"""Exports a model in several formats, and checks each by loading it as its users would."""

"""Export a model in several formats, and check each export by loading it as a user would."""

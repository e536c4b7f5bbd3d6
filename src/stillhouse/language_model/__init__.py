"""A language-model run: the stages' dependencies, their work, and their order."""

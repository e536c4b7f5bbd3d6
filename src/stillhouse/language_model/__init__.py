"""A language-model run: what each stage depends on, the work that fills it, and their order."""

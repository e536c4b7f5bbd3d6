"""A family of students: pruned and distilled in turn, each from the previous, larger one."""

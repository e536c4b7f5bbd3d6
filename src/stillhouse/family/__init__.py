"""Families of students that are pruned and distilled in turn, each from the previous, larger
one."""

"""A family of students: prune and distill in turn, each the start of the next smaller one."""

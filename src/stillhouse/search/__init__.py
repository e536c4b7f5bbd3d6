"""Finds the shape of a pruned student that meets a target and keeps most of its teacher."""

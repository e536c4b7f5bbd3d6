"""Search for the shape of a pruned student that meets a target and stays closest to its teacher."""

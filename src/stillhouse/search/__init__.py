"""Finds the shape of a pruned student that meets a target and keeps most of its teacher."""

from stillhouse.search.run import CANDIDATES, WORK, Found, search_shape

__all__ = ["CANDIDATES", "WORK", "Found", "search_shape"]

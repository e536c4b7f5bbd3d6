"""Makes a model smaller: fewer layers, narrower ones, fewer tokens; every layer alike."""

from stillhouse.pruning.axes import ARCHITECTURES
from stillhouse.pruning.prune import PruneReport, prune_model
from stillhouse.pruning.sizes import Sizes, check_sizes, resized_config, sizes_of
from stillhouse.pruning.surgery import check_saved

__all__ = [
    "ARCHITECTURES",
    "PruneReport",
    "Sizes",
    "check_saved",
    "check_sizes",
    "prune_model",
    "resized_config",
    "sizes_of",
]

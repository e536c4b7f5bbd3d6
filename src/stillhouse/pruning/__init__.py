"""Makes a model smaller: fewer layers, narrower FFNs, every layer alike."""

from stillhouse.pruning.axes import ARCHITECTURES, check_sizes
from stillhouse.pruning.prune import PruneReport, prune_model
from stillhouse.pruning.surgery import check_saved

__all__ = ["ARCHITECTURES", "PruneReport", "check_saved", "check_sizes", "prune_model"]

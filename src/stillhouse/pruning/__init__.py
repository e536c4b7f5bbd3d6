"""Makes a model smaller: fewer layers, narrower ones, fewer tokens; every layer alike."""

from stillhouse.pruning.axes import ARCHITECTURES
from stillhouse.pruning.prune import Calibration, PruneReport, check_importance, prune_model
from stillhouse.pruning.sizes import Sizes, check_sizes, resized_config, sizes_of
from stillhouse.pruning.surgery import check_saved
from stillhouse.pruning.tokens import prune_tokenizer
from stillhouse.pruning.vocabulary import (
    expected_tokens,
    kept_token_ids,
    load_kept_ids,
    save_kept_ids,
)

__all__ = [
    "ARCHITECTURES",
    "Calibration",
    "PruneReport",
    "Sizes",
    "check_importance",
    "check_saved",
    "check_sizes",
    "expected_tokens",
    "kept_token_ids",
    "load_kept_ids",
    "prune_model",
    "prune_tokenizer",
    "resized_config",
    "save_kept_ids",
    "sizes_of",
]

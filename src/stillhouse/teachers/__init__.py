"""Models that answer: where they come from, how they load, and their halves."""

from stillhouse.teachers.backbone import (
    check_head,
    dense_signal,
    hidden_states,
    lm_head,
    trim_head,
)
from stillhouse.teachers.local import load_config, load_model, load_tokenizer, save_tokenizer
from stillhouse.teachers.source import ModelSource, resolve_model
from stillhouse.teachers.vocabulary import VocabularyMatch, check_rows, check_same_vocabulary

__all__ = [
    "ModelSource",
    "VocabularyMatch",
    "check_head",
    "check_rows",
    "check_same_vocabulary",
    "dense_signal",
    "hidden_states",
    "lm_head",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_model",
    "save_tokenizer",
    "trim_head",
]

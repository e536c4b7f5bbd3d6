"""The model to ship, in the formats asked for, each checked by loading it as a stranger would."""

from stillhouse.export.card import CardFacts, license_warning, teacher_license, write_card
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.compressed import (
    announce_compressed,
    export_compressed,
    require_llm_compressor,
)
from stillhouse.export.gate import Gate, Likeness, ReplayResult, ReplayText, against_teacher
from stillhouse.export.gguf import WEIGHED, announce_gguf, export_gguf
from stillhouse.export.hub import Pushed, push, require_token
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.export.torchao import export_torchao, require_torchao

__all__ = [
    "WEIGHED",
    "CardFacts",
    "Gate",
    "Likeness",
    "Pushed",
    "ReplayResult",
    "ReplayText",
    "against_teacher",
    "announce_compressed",
    "announce_gguf",
    "export_checkpoint",
    "export_compressed",
    "export_gguf",
    "export_torchao",
    "has_llama_cpp",
    "license_warning",
    "push",
    "require_llm_compressor",
    "require_token",
    "require_torchao",
    "teacher_license",
    "write_card",
]

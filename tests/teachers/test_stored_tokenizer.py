"""Tokenizers follow tokenizer.json, whatever class transformers chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stillhouse.teachers.load_model import load_tokenizer
from tests import tiny

TEXT = "In 2023 the CAT paid 650841823"


def folder_of(tmp_path: Path, kind: str, name: str | None, **rules: Any) -> Path:
    """A model folder with a model type, a tokenizer class, and changes to tokenizer.json."""
    folder = tiny.save_model(tmp_path / "m")
    for file, changes in (
        ("config.json", {"model_type": kind}),
        ("tokenizer_config.json", {"tokenizer_class": name}),
        ("tokenizer.json", rules),
    ):
        content = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen2", "PreTrainedTokenizerFast"),  # in Stillhouse's own exports
        ("qwen2", "LlamaTokenizerFast"),  # DeepSeek-R1-Distill-Qwen
        ("qwen3", "Qwen2TokenizerFast"),
        ("llama", "GPT2TokenizerFast"),  # OLMo, Granite
        ("gpt2", None),
    ],
)
def test_rules_that_transformers_would_replace_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str | None
) -> None:
    folder = folder_of(tmp_path, kind, name, normalizer={"type": "Lowercase"})
    right = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = right.encode(TEXT, add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != expected
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == expected
    assert len(tokenizer) == right.get_vocab_size()
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", tiny.CHAT_TEMPLATE)
    assert "exactly as tokenizer.json defines it" in capsys.readouterr().err


def test_a_tokenizer_that_transformers_loads_unchanged_keeps_its_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, "gpt2", "GPT2Tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    unknown = {"id": len(tiny.tokenizer()), "content": "<|endoftext|>"}  # GPT-2's own
    content["added_tokens"].append({**content["added_tokens"][0], **unknown})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert type(load_tokenizer(folder)).__name__ == "GPT2Tokenizer"
    assert "tokenizer.json" not in capsys.readouterr().err

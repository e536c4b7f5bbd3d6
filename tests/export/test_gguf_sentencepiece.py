"""A SentencePiece-like tokenizer in a GGUF file finds the same tokens as in its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from stillhouse.errors import ModelError
from stillhouse.export.gate import Gate
from stillhouse.export.gguf_export import announce_gguf, export_gguf
from stillhouse.export.gguf_file import FORMATS, write_gguf
from stillhouse.export.gguf_tokenizer import read_otherwise_by_transformers, tokenizer_in_gguf
from stillhouse.export.replay import LlamaCpp
from stillhouse.export.replay_checks import prompt_ids
from stillhouse.pruning.kept_tokens import Merges, prune_tokenizer
from stillhouse.teachers.gguf_families import ARCHITECTURES
from tests import tiny
from tests.export.conftest import ToyWindows
from tests.gguf_files import real
from tests.teachers.toys import CONFIGS, tiny_model

SPECIAL = ["<unk>", "<s>", "</s>", "<turn>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = tiny.text(300) + "Übermäßig naïve café: 数値 ключ — 100%.\n" * 20
TEXTS = [
    "the cat sees two apples 7.",
    "a dog  draws   the house 12\nnaïve café",
    "🦆 ducks 🏳️‍🌈 and é ü",
    "漢字かな交じり文、한국어 ключ",
    "1234567890 3.14 1e-9",
    "def f(x):\n    return x**2\r\n\tpass",
    "tab\tand \x07 bell, trailing ",
]
AFTER_SPECIAL = ["the cat<turn>a dog", "<turn>naïve"]
RULES: dict[str, tuple[str, Any, Any]] = {
    "llama 2": (
        "llama",
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "mistral": (
        "mistral",
        None,
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False),
    ),
    "gemma": (
        "gemma3_text",
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
}
"""Model type, normalizer, and pre-tokenizer."""


def tokenizer(normalizer: Any, pre_tokenizer: Any, *, every_pair: bool = True) -> Any:
    """A BPE tokenizer trained on CORPUS.

    every_pair: its merges are all pairs that make a token, as in converted SentencePiece models.
    """
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learned.train_from_iterator(
        CORPUS.splitlines(), BpeTrainer(vocab_size=300, special_tokens=["\n"], show_progress=False)
    )
    state = json.loads(learned.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].get)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *words])}
    merges = generate_merges({word: vocabulary[word] for word in words})
    if not every_pair:
        merges = [tuple(pair) for pair in state["merges"]]
    core = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken("\n\n", normalized=False)])
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def write(folder: Path, name: str, *, kept: int | None = None, extra: int = 3) -> Any:
    """Writes folder/source, a checkpoint, and folder/toy.gguf; returns the tokenizer.

    kept: not None: prune the tokenizer.
    extra: embedding rows without a token.
    """
    kind, normalizer, pre_tokenizer = RULES[name]
    words = tokenizer(normalizer, pre_tokenizer)
    if kept is not None:
        merges = Merges(words)
        needed = merges.alphabet() | merges.added.keys()
        for text in TEXTS[:2]:
            for index in words(text)["input_ids"]:
                needed |= merges.parts(index)
        words = prune_tokenizer(words, sorted(needed))
    changes: dict[str, Any] = {"vocab_size": len(words) + extra, "initializer_range": 0.05}
    if name == "gemma":
        # Sizes that transformers' GGUF loader reads correctly.
        changes |= {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "layer_types": ["sliding_attention"] * 3,
            "sliding_window": 8,
        }
    if name == "mistral":
        changes["sliding_window"] = None
    source = folder / "source"
    tiny_model(kind, **changes).save_pretrained(source)
    words.save_pretrained(source)
    write_gguf(source, folder / "toy.gguf", FORMATS["f32"], name="toy")
    return AutoTokenizer.from_pretrained(source)


@pytest.mark.parametrize("kept", [None, 1])
@pytest.mark.parametrize("name", RULES)
def test_transformers_finds_the_same_tokens(tmp_path: Path, name: str, kept: int | None) -> None:
    words = write(tmp_path, name, kept=kept)
    held = tokenizer_in_gguf(words)
    assert read_otherwise_by_transformers(held, ARCHITECTURES[RULES[name][0]]) is None
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="toy.gguf")
    for text in TEXTS:
        assert read(text)["input_ids"] == words(text)["input_ids"], text
    assert read.eos_token_id == words.eos_token_id
    assert len(words(TEXTS[0])["input_ids"]) < len(TEXTS[0]) - 5, "tokens were merged"


@real
@pytest.mark.parametrize("kept", [None, 1])
@pytest.mark.parametrize("name", RULES)
def test_llama_cpp_finds_the_same_tokens(tmp_path: Path, name: str, kept: int | None) -> None:
    words = write(tmp_path, name, kept=kept)
    runtime = LlamaCpp(tmp_path / "toy.gguf")
    # llama.cpp puts a space after a special token; Metaspace's "first" does not.
    for text in TEXTS + (AFTER_SPECIAL if name != "mistral" else []):
        assert runtime.tokens(text) == words(text)["input_ids"], text


def test_scores_fall_with_the_merges_and_every_token_has_its_type(tmp_path: Path) -> None:
    words = write(tmp_path, "llama 2")
    fields = gguf.GGUFReader(tmp_path / "toy.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"].contents(), strict=True))
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    assert [scores[token] for token in made] == sorted((scores[t] for t in made), reverse=True)
    kinds = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    found = {token: gguf.TokenType(kind).name for token, kind in kinds.items()}
    assert found["<unk>"] == "UNKNOWN"
    assert found["<turn>"] == "CONTROL"
    assert found["<0x0A>"] == "BYTE"
    assert found["\n\n"] == "USER_DEFINED"
    assert found["▁t"] == "NORMAL"
    assert [kind for token, kind in found.items() if "[PAD" in token] == ["UNUSED"] * 3
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_a_student_with_a_pruned_tokenizer_is_exported(tmp_path: Path) -> None:
    write(tmp_path, "mistral", kept=1)
    gate = Gate(tmp_path / "source", ToyWindows(), TEXTS[:2], seed=0)
    result = export_gguf(gate, tmp_path / "out", kind="q8_0", name="toy")
    assert result.kl < 0.02
    assert result.notes == []


CHAT = "<s><turn>{{ messages[0]['content'] }}<turn>"


def test_a_tokenizer_that_puts_a_space_before_the_first_text_only_is_written_for_chats(
    tmp_path: Path,
) -> None:
    words = write(tmp_path, "mistral")
    words.chat_template = CHAT
    words.save_pretrained(tmp_path / "source")
    gate = Gate(tmp_path / "source", ToyWindows(), TEXTS[:2], seed=0)
    result = export_gguf(gate, tmp_path / "out", kind="f16", name="toy")
    assert "written for chats" in result.notes[0]
    fields = gguf.GGUFReader(tmp_path / "out" / "toy-f16.gguf").fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False


@real
def test_llama_cpp_finds_the_same_tokens_in_chats(tmp_path: Path) -> None:
    words = write(tmp_path, "mistral")
    words.chat_template = CHAT
    words.save_pretrained(tmp_path / "source")
    write_gguf(tmp_path / "source", tmp_path / "toy.gguf", FORMATS["f32"], name="toy")
    runtime = LlamaCpp(tmp_path / "toy.gguf")
    for text in TEXTS:
        assert runtime.chat_tokens(text) == prompt_ids(words, text), text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (tokenizer(*RULES["gemma"][1:], every_pair=False), "never merge"),
        (tokenizer(None, None), "do not write a space as"),
        (tokenizer(normalizers.NFKC(), None), "the normalizer NFKC"),
        (tokenizer(None, pre_tokenizers.Metaspace(split=True)), "split text by Metaspace"),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_differently_are_rejected(
    words: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        list(announce_gguf("f16", CONFIGS["llama"](), words))


def test_a_space_that_transformers_places_differently_is_noted() -> None:
    words = tokenizer(*RULES["gemma"][1:])
    said = read_otherwise_by_transformers(tokenizer_in_gguf(words), ARCHITECTURES["llama"])
    assert said is not None
    assert "a space before a text" in said

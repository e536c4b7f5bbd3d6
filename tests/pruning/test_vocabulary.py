"""With fewer tokens, any text still round-trips, and text of kept tokens is split as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch.testing import assert_close
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stillhouse.errors import ModelError, RecipeError
from stillhouse.pruning.kept_tokens import Merges, prune_tokenizer
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.surgery import check_saved, cut_rows_without_tokens
from stillhouse.pruning.vocabulary_cut import (
    KEPT_IDS,
    expected_tokens,
    kept_token_ids,
    load_kept_ids,
    save_kept_ids,
)
from stillhouse.signals import lm_head as head_module
from stillhouse.students.build_student import build_student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import resolve_model
from stillhouse.teachers.older_names import save_tokenizer
from tests import tiny
from tests.teachers.toys import ToyWindows, tiny_model, toy_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>"]
ADDED = "<|tool|>"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}</s>{% endfor %}"
CORPUS = tiny.text(300) + "Übermäßig naïve café: 数値 ключ — 100%.\n" * 20
KEPT_TEXT = "the cat sees two apples 7.\na dog draws the house 12. naïve café\n"
HARD = [
    "🦆 ducks 🏳️‍🌈 and é ü",
    "漢字かな交じり文、한국어",
    "tab\tnull\x00bell\x07 escape\x1b end",
    "  two  spaces  ",
    "<s> a </s> <|im_start|>x<|tool|>",
    "def f(x):\n    return x**2\r\n",
]


def byte_level(ignore_merges: bool = False) -> Any:
    """A tokenizer like those of SmolLM2 and Qwen, or with ignore_merges, of Llama 3."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return wrapped(core, BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))


def byte_fallback() -> Any:
    """Like Llama 2's and Gemma's: it merges whole texts, and unknown characters become bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    made = wrapped(core, BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False))
    # The trainer takes the byte tokens for special ones; real checkpoints do not.
    content = json.loads(made.backend_tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"][1:3] != "0x"]
    content["pre_tokenizer"] = None
    return fast(Tokenizer.from_str(json.dumps(content)))


def wrapped(core: Tokenizer, trainer: BpeTrainer) -> Any:
    core.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    core.add_tokens([AddedToken(ADDED, normalized=False)])
    start = core.token_to_id("<s>")
    core.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)]
    )
    return fast(core)


def fast(core: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


KINDS = {
    "byte-level": byte_level(),
    "byte-level, ignore_merges": byte_level(ignore_merges=True),
    "byte-fallback": byte_fallback(),
}


class TextWindows:
    """One window: the tokens of a text, and padding."""

    def __init__(self, tokenizer: Any, text: str, padding: int = 0) -> None:
        ids = tokenizer(text)["input_ids"]
        self.ids = torch.tensor(ids + [tokenizer.pad_token_id] * padding)
        self.labels = torch.tensor(ids + [-100] * padding)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids,
            "labels": self.labels,
            "position_ids": torch.arange(len(self.ids)),
        }


def kept_for_text(kind: str, vocabulary: Any = "data") -> tuple[int, ...]:
    return kept_token_ids(KINDS[kind], TextWindows(KINDS[kind], KEPT_TEXT), vocabulary)


PRUNED = {kind: prune_tokenizer(KINDS[kind], kept_for_text(kind)) for kind in KINDS}


def core_of(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_tokenizer_is_smaller_and_its_ids_have_no_gaps(kind: str) -> None:
    ids = sorted(PRUNED[kind].get_vocab().values())
    assert ids == list(range(len(kept_for_text(kind))))
    assert len(ids) < len(KINDS[kind].get_vocab())
    assert len(ids) % 64 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_text_is_tokenized_as_before(kind: str) -> None:
    kept_ids = kept_for_text(kind)
    for text in (KEPT_TEXT, *KEPT_TEXT.splitlines(keepends=True)):
        old = KINDS[kind](text)["input_ids"]
        assert [kept_ids[new] for new in PRUNED[kind](text)["input_ids"]] == old


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_round_trip(kind: str, text: str) -> None:
    for tokenizer in (KINDS[kind], PRUNED[kind]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_round_trips(text: str) -> None:
    for kind, tokenizer in PRUNED.items():
        # There, ▁ itself is decoded as a space, before and after pruning.
        expected = text.replace("▁", " ") if kind == "byte-fallback" else text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_closed_under_their_parents(kind: str) -> None:
    model = core_of(PRUNED[kind])["model"]
    assert model["merges"]
    for first, second in model["merges"]:
        assert {first, second, first + second} <= model["vocab"].keys()
    # No merge between kept tokens is lost, and their order is the old one.
    old = core_of(KINDS[kind])["model"]["merges"]
    assert model["merges"] == [
        pair for pair in old if {*pair, "".join(pair)} <= model["vocab"].keys()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_the_template_and_the_post_processor_are_kept(
    kind: str, tmp_path: Path
) -> None:
    save_tokenizer(PRUNED[kind], tmp_path)
    old, new = KINDS[kind], load_tokenizer(tmp_path)
    for token in [*SPECIAL, ADDED]:
        id = new.convert_tokens_to_ids(token)
        assert kept_for_text(kind)[id] == old.convert_tokens_to_ids(token)
        assert new(f"a{token}b", add_special_tokens=False)["input_ids"].count(id) == 1
    assert new.eos_token_id == new.pad_token_id == new.convert_tokens_to_ids("</s>")
    assert new("cat")["input_ids"][0] == new.bos_token_id
    chat = [{"role": "user", "content": "the cat"}]
    assert new.apply_chat_template(chat, tokenize=False) == "<|im_start|>the cat</s>"
    assert new.decode(new("<s>cat</s>")["input_ids"], skip_special_tokens=True) == "cat"


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_size_keeps_the_most_frequent_tokens(kind: str) -> None:
    least = len(kept_for_text(kind, len(KINDS[kind].get_vocab())))
    text = "zq " * 50 + "the cat"
    # Bytes and special tokens, and with byte fallback <unk> and ▁.
    needed = 256 + len(SPECIAL) + 1 + 2 * (kind == "byte-fallback")
    windows = TextWindows(KINDS[kind], "the cat sees the cat. the the\n")
    kept = kept_token_ids(KINDS[kind], windows, needed + 12)
    assert len(kept) == needed + 12 < least
    word = KINDS[kind](" the", add_special_tokens=False)["input_ids"]
    assert set(word) <= set(kept)
    assert set(kept) >= {KINDS[kind].convert_tokens_to_ids(token) for token in SPECIAL}
    tokenizer = prune_tokenizer(KINDS[kind], kept)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokens_that_the_teacher_expects_are_kept_before_others() -> None:
    """The token is not in the calibration text, but it can be in other text."""
    tokenizer = KINDS["byte-level"]
    merges = Merges(tokenizer)
    windows = TextWindows(tokenizer, "the cat")
    least = len(kept_token_ids(tokenizer, windows, "data"))
    usual = set(kept_token_ids(tokenizer, windows, least))
    last = max(merges.tokens.keys() - merges.added.keys() - usual)
    expected_V = torch.zeros(last + 1)
    expected_V[last] = 0.1
    size = len(usual | merges.parts(last))
    assert last not in kept_token_ids(tokenizer, windows, size)
    assert last in kept_token_ids(tokenizer, windows, size, expect=lambda: expected_V)


def test_padding_does_not_affect_which_tokens_are_kept() -> None:
    """If padding were counted, it would lower the shares of the text's tokens."""
    tokenizer = KINDS["byte-level"]
    size = len(kept_for_text("byte-level")) + 10
    windows = [TextWindows(tokenizer, KEPT_TEXT, padding) for padding in (0, 50_000)]
    assert kept_token_ids(tokenizer, windows[0], size) == kept_token_ids(
        tokenizer, windows[1], size
    )


def test_expected_tokens_are_the_mean_probabilities_over_all_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, windows = tiny_model(), ToyWindows(count=5, padding=3)
    found_V = expected_tokens(model, windows, 10_000, 0, torch.float32)
    positions = windows.positions.expand(5, -1)
    logits_RLV = model(input_ids=windows.ids, position_ids=positions, use_cache=False).logits
    assert_close(found_V.float(), logits_RLV[:, :-3].softmax(-1).mean((0, 1)))
    monkeypatch.setattr(head_module, "CHUNK_LOGITS", 3 * model.config.vocab_size)
    assert_close(expected_tokens(model, windows, 10_000, 0, torch.float32), found_V)


def test_an_impossible_number_is_rejected_before_the_teacher_runs() -> None:
    def runs() -> torch.Tensor:
        raise AssertionError

    windows = TextWindows(KINDS["byte-level"], KEPT_TEXT)
    with pytest.raises(RecipeError, match="vocabulary: 10 is not possible"):
        kept_token_ids(KINDS["byte-level"], windows, 10, expect=runs)


def test_another_students_tokens_can_be_kept(tmp_path: Path) -> None:
    kept = kept_for_text("byte-level")
    save_kept_ids(kept, tmp_path)
    assert kept_for_text("byte-level", tmp_path / KEPT_IDS) == kept
    # A configuration may name ids that the tokenizer does not have.
    config = LlamaConfig(eos_token_id=450)
    save_kept_ids([*kept, 450], tmp_path)
    windows = TextWindows(KINDS["byte-level"], KEPT_TEXT)
    found = kept_token_ids(KINDS["byte-level"], windows, tmp_path / KEPT_IDS, configs=[config])
    assert set(found) >= {*kept, 450}


def test_keeping_all_tokens_changes_nothing() -> None:
    for kind, tokenizer in KINDS.items():
        kept = kept_for_text(kind, len(tokenizer.get_vocab()))
        assert list(kept) == list(range(len(tokenizer.get_vocab())))
        assert core_of(prune_tokenizer(tokenizer, kept))["model"] == core_of(tokenizer)["model"]


@pytest.mark.parametrize(("vocabulary", "nearest"), [(10, 260), (10_000, 420 + 4)])
def test_the_error_for_an_impossible_size_names_the_nearest_one(
    vocabulary: int, nearest: int
) -> None:
    with pytest.raises(RecipeError, match=f"vocabulary: {vocabulary} is not possible") as caught:
        kept_for_text("byte-level", vocabulary)
    assert f"nearest: {nearest}" in str(caught.value)


def test_special_tokens_and_bytes_cannot_be_removed() -> None:
    tokenizer = KINDS["byte-level"]
    kept = kept_for_text("byte-level")
    for lost, message in (
        (tokenizer.convert_tokens_to_ids("</s>"), "lose 1 special or added tokens: '</s>'"),
        (tokenizer.convert_tokens_to_ids("Ġ"), "lose 1 tokens for single bytes"),
    ):
        with pytest.raises(RecipeError, match=message):
            prune_tokenizer(tokenizer, [id for id in kept if id != lost])
    with pytest.raises(RecipeError, match="listed twice"):
        prune_tokenizer(tokenizer, [*kept, kept[0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["lines", "names", "ids"])
def test_a_file_can_list_the_tokens_to_keep(kind: str, how: str, tmp_path: Path) -> None:
    expected = kept_for_text(kind)
    names = KINDS[kind].convert_ids_to_tokens(list(expected))
    content = {"names": json.dumps(names), "ids": json.dumps(expected)}
    file = tmp_path / ("tokens.txt" if how == "lines" else "tokens.json")
    # A token that contains a line break cannot be on a line of its own.
    broken = {id for id, name in zip(expected, names, strict=True) if "\n" in name}
    lines = "\n".join(name for name in names if "\n" not in name)
    # With a byte order mark, as some editors write it.
    file.write_text(content.get(how, lines), encoding="utf-8-sig")
    lost = broken if how == "lines" else set()
    assert set(kept_for_text(kind, file)) == set(expected) - lost


def test_the_parts_of_the_tokens_in_a_file_are_kept_too(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level"]
    merges = Merges(tokenizer)
    always = merges.alphabet() | merges.added.keys()
    word = max(set(kept_for_text("byte-level")) - always, key=lambda id: len(merges.parts(id)))
    names = [merges.tokens[id] for id in (*always, word)]
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(names), encoding="utf-8")
    assert set(kept_for_text("byte-level", file)) == always | merges.parts(word)


def test_a_token_file_without_required_tokens_is_rejected(tmp_path: Path) -> None:
    tokenizer, file = KINDS["byte-level"], tmp_path / "tokens.json"
    kept = tokenizer.convert_ids_to_tokens(list(kept_for_text("byte-level")))
    for lost in ("</s>", "Ġ"):
        file.write_text(json.dumps([name for name in kept if name != lost]), encoding="utf-8")
        with pytest.raises(RecipeError, match=rf"lacks required tokens \(1\): {lost}"):
            kept_for_text("byte-level", file)
    for unknown, shown in (
        ("no such token", "no such"),
        (["Ġthe", 7], r"\['Ġthe', 7\]"),
        ({"id": 7}, "{'id': 7}"),
        (7.0, "7.0"),
        (None, "None"),
    ):
        file.write_text(json.dumps([*kept, unknown]), encoding="utf-8")
        with pytest.raises(RecipeError, match=rf"the teacher does not have \(1\): {shown}"):
            kept_for_text("byte-level", file)
    with pytest.raises(RecipeError, match="cannot be read"):
        kept_for_text("byte-level", tmp_path / "missing.txt")
    for content in ("3", '{"tokens": []}', "["):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(RecipeError, match="cannot be read"):
            kept_for_text("byte-level", file)


def test_other_tokenizers_are_rejected() -> None:
    with pytest.raises(RecipeError, match="type WordLevel cannot be pruned: only BPE is"):
        kept_token_ids(toy_tokenizer(), ToyWindows(), "data")
    characters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(RecipeError, match="no tokens for single bytes"):
        kept_token_ids(characters, ToyWindows(), "data")
    unigram = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0))
    )
    with pytest.raises(RecipeError, match="type Unigram cannot be pruned"):
        prune_tokenizer(unigram, [0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_rows_and_token_ids_follow_the_kept_tokens(tied: bool) -> None:
    def teacher() -> Any:
        return tiny_model(tie_word_embeddings=tied, eos_token_id=[2, 5], pad_token_id=2)

    kept = [1, 2, 5, 90, 40, 7]
    model = teacher()
    prune_model(model, ToyWindows(), kept_ids=kept)
    new = torch.tensor([[0, 3, 4, 5, 1]])
    old = torch.tensor(kept)[new]
    expected = teacher()(input_ids=old, use_cache=False).logits[..., kept]
    assert_close(model(input_ids=new, use_cache=False).logits, expected)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, 2], 1)
    with pytest.raises(RecipeError, match="lose token 5, which is the model's eos_token_id"):
        prune_model(teacher(), ToyWindows(), kept_ids=[1, 2, 7])
    with pytest.raises(RecipeError, match="token 96, but the teacher has only 96"):
        prune_model(teacher(), ToyWindows(), kept_ids=[1, 2, 5, 96])


def test_token_lists_of_the_generation_config_follow_the_kept_tokens() -> None:
    model = tiny_model(eos_token_id=[2, 5], pad_token_id=2)
    model.generation_config.update(
        forced_bos_token_id=90,
        suppress_tokens=[7, 40],
        begin_suppress_tokens=[3, 40],
        bad_words_ids=[[40], [40, 3], [7, 90]],
        force_words_ids=[[[3], [7]], [[3]], [[40], [2, 5]]],
        sequence_bias={(3,): -1.0, (90, 40): 2.0},
    )
    prune_model(model, ToyWindows(), kept_ids=[1, 2, 5, 90, 40, 7])
    config = model.generation_config
    assert config.forced_bos_token_id == 3
    assert config.suppress_tokens == [5, 4]
    assert config.begin_suppress_tokens == [4]
    assert config.bad_words_ids == [[4], [5, 3]]
    assert config.force_words_ids == [[[5]], [[4], [1, 2]]]
    assert config.sequence_bias == [[[3, 4], 2.0]]


def test_token_lists_of_the_generation_config_lose_ids_without_tokens() -> None:
    model = tiny_model()
    model.generation_config.update(bad_words_ids=[[40], [90]], sequence_bias=[[[90], -1]])
    assert cut_rows_without_tokens(model, 64)
    assert model.generation_config.bad_words_ids == [[40]]
    assert model.generation_config.sequence_bias is None


def test_a_student_with_fewer_tokens_has_its_tokenizer_and_the_map(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level"]
    end = tokenizer.eos_token_id
    # A few embedding rows more than tokens, as in Qwen.
    teacher = tiny_model(
        vocab_size=440, eos_token_id=end, pad_token_id=end, bos_token_id=tokenizer.bos_token_id
    )
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    # As in many published models; it has no effect without do_sample.
    generation_file = tmp_path / "teacher" / "generation_config.json"
    generation = json.loads(generation_file.read_text())
    generation_file.write_text(json.dumps(generation | {"temperature": 0.9}))
    summary = build_student(
        PrunedStudent(start="pruned", vocabulary=320, ffn_size=32, heads=2),
        teacher=resolve_model("teacher", base=tmp_path, cache=tmp_path / "cache"),
        windows=TextWindows(tokenizer, KEPT_TEXT),
        seed=0,
        base=tmp_path,
        out=tmp_path / "student",
    )
    assert summary["pruning"]["changed"]["vocabulary"] == (440, 320)
    student = load_model(tmp_path / "student", dtype=torch.float32)
    kept_ids = load_kept_ids(tmp_path / "student")
    assert kept_ids is not None
    assert len(kept_ids) == student.config.vocab_size == 320
    cut = load_tokenizer(tmp_path / "student")
    assert cut.eos_token_id == student.config.eos_token_id == kept_ids.index(end)
    assert student.generation_config.temperature == 0.9
    assert load_kept_ids(tmp_path / "teacher") is None
    check_saved(student, tmp_path / "student", torch.tensor([cut("the cat")["input_ids"]]))
    (tmp_path / "student" / "kept_ids.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_kept_ids(tmp_path / "student")

"""Every token of both vocabularies has a root: a token that both have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from stillhouse.errors import ModelError
from stillhouse.teachers import roots_file
from stillhouse.teachers.align_tokens import TokenAligner
from stillhouse.teachers.roots import Roots, make_roots, merged
from stillhouse.teachers.roots_file import ROOTS, SUMMARY, cached_roots, load_roots, save_roots
from stillhouse.teachers.text_tokens import TextTokens
from tests.teachers.tokenizer_toys import KINDS, byte_level, sentencepiece


def roots_of(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> tuple[TextTokens, TextTokens, Roots]:
    ours, theirs = TextTokens(student), TextTokens(teacher)
    ends = (student.eos_token_id, teacher.eos_token_id)
    return ours, theirs, make_roots(ours, theirs, [ends])


def slow_root(value: bytes, ours: TextTokens, theirs: TextTokens) -> bytes:
    """The definition: take the first token of the other tokenizer's encoding until both have it.

    If that tokenizer adds a space in front, take the longest token that the string begins with.
    """
    sides = [set(ours.strings.values()), set(theirs.strings.values())]
    while not all(value in side for side in sides):
        other = theirs if value in sides[0] else ours
        (ids,) = other.encode([value.decode()])
        first = other.strings.get(int(ids[0]), b"")
        if not first or not value.startswith(first):
            first = max((v for v in other.strings.values() if value.startswith(v)), key=len)
        value = first
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_the_root_of_a_token_is_its_first_piece_that_both_vocabularies_have(kind: str) -> None:
    ours, theirs, roots = roots_of(byte_level(300), KINDS[kind]())
    shared = {value: roots.student_V[id] for id, value in ours.strings.items()}
    for tokens, root_X in ((ours, roots.student_V), (theirs, roots.teacher_W)):
        for id, value in tokens.strings.items():
            if value.isascii():
                assert root_X[id] == shared[slow_root(value, ours, theirs)], value


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_begins_with_the_bytes_of_its_root(kind: str) -> None:
    ours, theirs, roots = roots_of(byte_level(300), KINDS[kind]())
    strings: dict[int, bytes] = {}
    common = set(ours.strings.values()) & set(theirs.strings.values())
    for id, value in ours.strings.items():
        if value in common:
            strings[int(roots.student_V[id])] = value
    assert len(strings) == roots.shared == len(common)
    for tokens, root_X in ((ours, roots.student_V), (theirs, roots.teacher_W)):
        assert root_X.shape == (tokens.size,)
        for id, value in tokens.strings.items():
            assert value.startswith(strings[int(root_X[id])])


def test_with_equal_vocabularies_every_token_is_its_own_root() -> None:
    ours, _, roots = roots_of(byte_level(300), byte_level(300))
    assert (roots.student_V == roots.teacher_W).all()
    assert len(set(roots.student_V[list(ours.strings)])) == len(ours.strings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_root_has_tokens_of_both_vocabularies(kind: str) -> None:
    _, _, roots = roots_of(byte_level(300), KINDS[kind]())
    assert set(roots.student_V) == set(roots.teacher_W) == set(range(roots.count))


def test_special_tokens_of_only_one_vocabulary_share_the_root_of_the_end_of_text() -> None:
    ours, theirs, roots = roots_of(byte_level(300), KINDS["sentencepiece"]())
    root = roots.student_V[ours.tokenizer.eos_token_id]
    assert (roots.student_V == root).sum() == 1
    assert set(np.flatnonzero(roots.teacher_W == root)) == set(theirs.special)


def test_special_tokens_without_a_counterpart_share_a_root() -> None:
    student = byte_level(300, special=("<|turn|>",))
    _, theirs, roots = roots_of(student, KINDS["sentencepiece"]())
    other = roots.student_V[student.convert_tokens_to_ids("<|turn|>")]
    assert other == roots.teacher_W[theirs.tokenizer.bos_token_id] == roots.count - 1
    assert roots.student_V[student.eos_token_id] != other


def test_roots_of_tokens_that_begin_at_the_same_place_are_merged() -> None:
    roots = Roots(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 3, 1]), 5, 4)
    found = merged(roots, {(0, 1): 7, (2, 2): 9, (3, 4): 1})
    assert found.student_V.tolist() == [0, 0, 1, 0]
    assert found.teacher_W.tolist() == [0, 0, 1, 0, 0]
    assert found.count == 3
    assert found.merges == ((0, 1, 7), (3, 4, 1))


@pytest.fixture
def aligner() -> TokenAligner:
    return TokenAligner(byte_level(300), sentencepiece(120))


def test_roots_are_read_as_they_were_written(aligner: TokenAligner, tmp_path: Path) -> None:
    roots = merged(aligner.roots(), {(300, 5): 3})
    save_roots(roots, tmp_path, aligner)
    found = load_roots(tmp_path, aligner)
    assert (found.student_V == roots.student_V).all()
    assert (found.teacher_W == roots.teacher_W).all()
    assert (found.count, found.shared, found.merges) == (roots.count, roots.shared, roots.merges)


def test_the_summary_shows_what_was_merged(aligner: TokenAligner, tmp_path: Path) -> None:
    (ours,) = [id for id, text in aligner.student.strings.items() if text == b"a"][:1]
    (theirs,) = [id for id, text in aligner.teacher.strings.items() if text == b"b"][:1]
    save_roots(merged(aligner.roots(), {(ours, theirs): 7}), tmp_path, aligner)
    found = json.loads((tmp_path / SUMMARY).read_text())
    (merge,) = found["merged_since_they_begin_at_one_place_of_the_text"]
    assert merge == {"student": "a", "teacher": "b", "times": 7}
    assert found["student"]["tokens"] == 300
    assert ["<|end|>", "<eos>"] in found["special_tokens_of_one_meaning"]


def test_roots_of_other_tokenizers_are_rejected(aligner: TokenAligner, tmp_path: Path) -> None:
    save_roots(aligner.roots(), tmp_path, aligner)
    other = TokenAligner(byte_level(310), sentencepiece(120))
    with pytest.raises(ModelError, match="belongs to different tokenizers"):
        load_roots(tmp_path, other)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_same_order_in_every_process(kind: str) -> None:
    """The order of a vocabulary's dict differs between processes."""
    tokens = TextTokens(KINDS[kind]())
    assert list(tokens.strings) == sorted(tokens.strings)


def test_roots_of_a_pair_of_tokenizers_are_cached(
    aligner: TokenAligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cached_roots(aligner, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TokenAligner, "roots", None)
        again = cached_roots(TokenAligner(byte_level(300), sentencepiece(120)), tmp_path)
    assert (again.student_V == made.student_V).all()
    assert (again.teacher_W == made.teacher_W).all()


@pytest.mark.parametrize("damage", [b"", b"\0" * 100])
def test_a_damaged_cache_is_made_again(
    aligner: TokenAligner, tmp_path: Path, damage: bytes
) -> None:
    made = cached_roots(aligner, tmp_path)
    (file,) = tmp_path.rglob(ROOTS)
    file.write_bytes(damage)
    assert (cached_roots(aligner, tmp_path).student_V == made.student_V).all()
    load_roots(file.parent, aligner)


@pytest.mark.parametrize("part", ["map", "facts"])
def test_a_changed_cache_fails_its_checksum_and_is_made_again(
    aligner: TokenAligner, tmp_path: Path, part: str
) -> None:
    made = cached_roots(aligner, tmp_path)
    (file,) = tmp_path.rglob(ROOTS)
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["roots"])
        maps = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if part == "map":
        maps["student"] = maps["student"].flip(0).contiguous()  # the same roots for other tokens
    else:
        facts["shared"] -= 1
    save_file(maps, file, metadata={"roots": json.dumps(facts)})
    with pytest.raises(ModelError, match="does not match its checksum"):
        load_roots(file.parent, aligner)
    assert (cached_roots(aligner, tmp_path).student_V == made.student_V).all()
    load_roots(file.parent, aligner)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_an_error(
    aligner: TokenAligner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(roots_file, "save_file", fails)
    assert cached_roots(aligner, tmp_path).count == aligner.roots().count
    assert not list(tmp_path.rglob(ROOTS))


def test_a_damaged_file_of_a_run_is_an_error(aligner: TokenAligner, tmp_path: Path) -> None:
    roots = aligner.roots()
    save_roots(replace(roots, count=roots.count + 1), tmp_path, aligner)
    with pytest.raises(ModelError, match="does not match the tokens"):
        load_roots(tmp_path, aligner)


def test_a_slow_tokenizer_is_rejected() -> None:
    with pytest.raises(ModelError, match="not a fast tokenizer"):
        TextTokens(object())

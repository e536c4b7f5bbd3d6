"""A student's window is rewritten in the teacher's tokens for the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from stillhouse.data.documents import Conversation
from stillhouse.data.tokenize_rows import tokenize
from stillhouse.errors import DataError, ModelError
from stillhouse.teachers.align_tokens import NOWHERE, AlignedWindow, TokenAligner
from stillhouse.teachers.roots import make_roots
from tests import chat_toys, tiny
from tests.teachers.tokenizer_toys import GEMMA, KINDS, byte_level, gemma, sentencepiece

STUDENT = byte_level(300)
ALIGNERS = {kind: TokenAligner(STUDENT, make()) for kind, make in KINDS.items()}


def window_of(*texts: str, cut: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A window of documents that end with EOS; all tokens but their first are supervised."""
    rows = [
        [*STUDENT(text, split_special_tokens=True)["input_ids"], STUDENT.eos_token_id]
        for text in texts
    ]
    ids = np.array([id for row in rows for id in row])[:cut]
    positions = np.array([place for row in rows for place in range(len(row))])[:cut]
    return ids, positions, np.where(positions > 0, ids, -100)


def align(aligner: TokenAligner, *texts: str, cut: int | None = None) -> AlignedWindow:
    ids, positions, labels = window_of(*texts, cut=cut)
    (found,) = aligner.align(ids[None], positions[None], labels[None])
    return found


def slow_places(aligner: TokenAligner, ids: np.ndarray, found: AlignedWindow) -> list[int]:
    """For a single text: the teacher's token with as many bytes before it as the student's has."""
    before: dict[int, int] = {}
    done = 0
    led = len(aligner._begin_teacher)
    for place, id in enumerate(found.ids_M[led:]):
        before.setdefault(done, place + led)
        done += aligner.teacher.lengths_V[id]
    places = []
    done = aligner._space
    for id in ids:
        places.append(before.get(done, NOWHERE))
        done += aligner.student.lengths_V[id]
    return [place if place > 0 else NOWHERE for place in places]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(text=st.text(st.sampled_from("the catdogsn .\n\t0123é漢🙂<|end|>"), min_size=1))
def test_shared_boundaries_match_a_count_of_bytes(kind: str, text: str) -> None:
    aligner = ALIGNERS[kind]
    ids, _, labels = window_of(text)
    if not (labels[1:] >= 0).any():
        return
    found = align(aligner, text)
    assert found.begins_L[:-1].tolist() == slow_places(aligner, ids[:-1], found)
    assert found.ids_M[found.begins_L[-1]] == aligner.teacher.tokenizer.eos_token_id
    decoded = aligner.teacher.decode([id for id in found.ids_M if id in aligner.teacher.strings])
    assert decoded.removeprefix(b" " * aligner._space) == text.encode()


def test_documents_stay_separate_and_begin_with_the_teachers_bos() -> None:
    aligner = ALIGNERS["sentencepiece"]
    found = align(aligner, "the cat", "a dog sees")
    starts = np.flatnonzero(found.positions_M == 0)
    assert len(starts) == 2
    assert (found.ids_M[starts] == aligner.teacher.tokenizer.bos_token_id).all()
    alone = align(aligner, "a dog sees")
    assert found.ids_M[starts[1] :].tolist() == alone.ids_M.tolist()


def test_a_shared_boundary_is_the_teachers_token_that_begins_there() -> None:
    """One position off, the teacher would predict a different token."""
    aligner = ALIGNERS["bytes"]
    ids, *_ = window_of("the cat sees 12")
    found = align(aligner, "the cat sees 12")
    for id, place in zip(ids[1:-1], found.begins_L[1:-1], strict=True):
        first = aligner.teacher.strings[int(found.ids_M[place])]
        assert aligner.student.strings[int(id)].startswith(first)


def test_incomplete_characters_at_both_ends_of_a_window_are_left_out() -> None:
    aligner = ALIGNERS["bytes"]
    ids = np.array(STUDENT("漢 the cat 漢")["input_ids"])[1:-1]  # without the outermost tokens
    positions = np.arange(len(ids))
    (found,) = aligner.align(ids[None], positions[None], ids[None])
    assert aligner.teacher.decode(found.ids_M) == b" the cat "
    assert (found.begins_L >= 0).sum() == 3


def test_the_string_of_a_special_token_in_text_stays_text() -> None:
    aligner = ALIGNERS["byte-level"]
    words = aligner.student.encode(["the <|end|> cat"])[0]
    positions = np.arange(len(words))
    (found,) = aligner.align(words[None], positions[None], words[None])
    assert aligner.teacher.tokenizer.eos_token_id not in found.ids_M
    assert aligner.teacher.decode(found.ids_M) == b"the <|end|> cat"


def test_documents_without_supervised_tokens_are_left_out() -> None:
    ids, positions, labels = window_of("the cat", "a dog")
    second = np.flatnonzero(positions == 0)[1]
    labels[second:] = -100
    (found,) = ALIGNERS["bytes"].align(ids[None], positions[None], labels[None])
    assert b"dog" not in ALIGNERS["bytes"].teacher.decode(
        [id for id in found.ids_M if id in ALIGNERS["bytes"].teacher.strings]
    )
    assert (found.begins_L[second:] == NOWHERE).all()


def test_a_special_token_without_a_counterpart_is_rejected_by_name() -> None:
    student = byte_level(300, special=("<|turn|>",))
    aligner = TokenAligner(student, sentencepiece(120))
    ids = np.array([student.convert_tokens_to_ids("<|turn|>"), *student("the cat")["input_ids"]])
    with pytest.raises(DataError, match=r"no token for <\|turn\|>"):
        aligner.align(ids[None], np.arange(len(ids))[None], ids[None])


def test_a_tokenizer_that_changes_text_is_rejected() -> None:
    teacher = tiny.tokenizer()
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="changes text"):
        TokenAligner(STUDENT, teacher)


# --- chats ---------------------------------------------------------------------------------------


def chat_row(messages: list[dict[str, str]], words: Any) -> tuple[np.ndarray, np.ndarray]:
    """A chat as the data stage tokenizes it: ids and labels."""
    (row,) = tokenize([Conversation(tuple(messages))], words)[0]
    ids = row.ids.astype(np.int64)
    return ids, np.where(row.supervised, ids, -100)


def aligned_chat(
    messages: list[dict[str, str]], teacher: Any, cut: int | None = None
) -> tuple[TokenAligner, np.ndarray, np.ndarray, AlignedWindow]:
    student = chat_toys.tokenizer()
    aligner = TokenAligner(student, teacher)
    ids, labels = (each[:cut] for each in chat_row(messages, student))
    (found,) = aligner.align(ids[None], np.arange(len(ids))[None], labels[None])
    return aligner, ids, labels, found


CHATS = [
    chat_toys.chat("say the cat", "the cat"),
    chat_toys.chat("one", "a dog", "two", "she sees 2 漢 apples"),
    [{"role": "system", "content": "be short"}, *chat_toys.chat("one", "a dog")],
]


@pytest.mark.parametrize("messages", CHATS)
def test_a_chat_is_rendered_with_the_teachers_template(messages: list[dict[str, str]]) -> None:
    teacher = gemma()
    aligner, ids, labels, found = aligned_chat(messages, teacher)
    rendered = teacher.apply_chat_template(messages, tokenize=False)
    assert teacher.decode(found.ids_M) == rendered
    answers = [m["content"].encode() + b"<end>" for m in messages if m["role"] == "assistant"]
    taught = (labels >= 0) & (found.begins_L >= 0)
    read = b"".join(
        aligner.teacher.strings.get(int(id), teacher.decode([int(id)]).encode())
        for id in found.ids_M[found.begins_L[taught]]
    )
    # The student has one token per byte, so that every token of the teacher's answers is read.
    assert read == b"".join(answers)
    ends = ids == aligner.student.tokenizer.eos_token_id
    assert (found.begins_L[ends & (labels >= 0)] >= 0).all()


def test_a_truncated_chat_is_rendered_up_to_where_it_ends() -> None:
    messages = chat_toys.chat("say the cat", "the cat sees a tree")
    _, _, labels, found = aligned_chat(messages, teacher := gemma(), cut=-8)
    whole = teacher.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(teacher.decode(found.ids_M))
    assert (found.begins_L[labels >= 0] >= 0).sum() == 4


def test_a_template_that_changes_contents_is_rejected() -> None:
    teacher = gemma(GEMMA.replace("m.content | trim", "m.content | upper"))
    with pytest.raises(DataError, match="with the same contents"):
        aligned_chat(CHATS[0], teacher)


def test_a_chat_whose_text_contains_a_control_token_is_rejected() -> None:
    messages = chat_toys.chat("say <|im_end|>", "the cat")
    with pytest.raises(DataError, match="not a chat that the teacher's template renders"):
        aligned_chat(messages, gemma())


def test_both_end_tokens_of_the_teacher_share_the_root_of_the_students_end() -> None:
    student, teacher = chat_toys.tokenizer(), gemma()
    aligner = TokenAligner(student, teacher)
    roots = make_roots(aligner.student, aligner.teacher, aligner.partners)
    end = roots.student_V[student.eos_token_id]
    of_teacher = set(np.flatnonzero(roots.teacher_W == end))
    assert {teacher.eos_token_id, teacher.convert_tokens_to_ids("<end>")} <= of_teacher


def slow_chunks(
    aligner: TokenAligner, ids: np.ndarray, positions: np.ndarray, found: AlignedWindow
) -> list[tuple[int, int, int, int]]:
    """Every pair of token runs with the same bytes, between two boundaries that both share."""
    chunks = []
    for start in np.flatnonzero(found.begins_L >= 0).tolist():
        begin = int(found.begins_L[start])
        if positions[start] == 0:
            continue  # not predicted
        if ids[start] == aligner.student.tokenizer.eos_token_id:
            chunks.append((start, start + 1, begin, begin + 1))
            continue
        later = range(start + 1, len(ids))
        stop = next((at for at in later if found.begins_L[at] >= 0 or positions[at] == 0), None)
        if stop is not None and positions[stop] > 0:
            chunks.append((start, stop, begin, int(found.begins_L[stop])))
    return chunks


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(
    texts=st.lists(st.text(st.sampled_from("the catdogs .\n0123é漢🙂"), min_size=1), max_size=3),
    cut=st.integers(1, 6),
)
def test_chunks_have_the_same_bytes_on_both_sides(kind: str, texts: list[str], cut: int) -> None:
    aligner = ALIGNERS[kind]
    ids, positions, labels = window_of(*texts, "the cat", cut=-cut)
    if not (labels >= 0).any():
        return
    (found,) = aligner.align(ids[None], positions[None], labels[None])
    chunks = aligner.chunks(found, ids, positions, labels >= 0)
    pairs = list(zip(chunks.student_C2.tolist(), chunks.teacher_C2.tolist(), strict=True))
    for (start, stop), (begin, end) in pairs:
        ours, theirs = (
            b"".join(tokens.strings.get(int(id), b"<special>") for id in part)
            for tokens, part in (
                (aligner.student, ids[start:stop]),
                (aligner.teacher, found.ids_M[begin:end]),
            )
        )
        assert ours == theirs
    expected = slow_chunks(aligner, ids, positions, found)
    assert [(*ours, *theirs) for ours, theirs in pairs] == [
        each for each in expected if each[0] < each[1] and each[2] < each[3]
    ]


def test_text_that_was_left_out_is_in_no_chunk() -> None:
    """After an incomplete character, the rest of a text is not encoded for the teacher."""
    aligner = ALIGNERS["bytes"]
    words = aligner.student
    broken = [*words.encode(["the "])[0], *words.encode(["漢"])[0][:1], *words.encode(["cat"])[0]]
    ids = np.array([*broken, words.tokenizer.eos_token_id])
    positions = np.arange(len(ids))
    (found,) = aligner.align(ids[None], positions[None], ids[None])
    chunks = aligner.chunks(found, ids, positions, positions > 0)
    assert all(len(ids) - 1 in range(*pair) or pair[1] < 4 for pair in chunks.student_C2.tolist())
    assert words.decode(ids[:-1]) != aligner.teacher.decode(found.ids_M[:-1])

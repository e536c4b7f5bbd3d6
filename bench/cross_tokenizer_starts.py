"""What all settings of an experiment in bench/cross_tokenizer.py share: the student before
training, the text, the teachers, and the measurements.

Shapes: R windows, L tokens, N supervised rows, D hidden width.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, PreTrainedTokenizerFast

import stillhouse as sh
from stillhouse.data.batches import Batch, Batches, collate, positions_of
from stillhouse.data.shift import IGNORED, supervised_rows
from stillhouse.evaluation.fidelity import compare, heldout_answers
from stillhouse.evaluation.measuring import bits_per_byte, supervised_bytes
from stillhouse.hardware import choose_precision, default_device
from stillhouse.objectives import Term, fused_loss
from stillhouse.signals import FoldedSignal
from stillhouse.students.pruned_student import prune_to
from stillhouse.students.student import Student
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.aligned_teacher import AlignedTeacher
from stillhouse.teachers.backbone import hidden_states, lm_head
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import Teacher

BATCH = 4
"""Windows measured at once, and the default number of windows per training step."""
PASSAGE = 4000


class Experiment:
    """What all experiments share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = default_device()
        self.dtype = choose_precision("auto", self.device).dtype
        text = options.text.read_text(encoding="utf-8")
        self.documents = wikitext_articles(text) if options.sentences else list(passages(text))

    @cached_property
    def own(self) -> LocalTeacher:
        return Teacher.load(self.options.student)

    @cached_property
    def other(self) -> LocalTeacher:
        return Teacher.load(self.options.teacher)

    def data(self, tokenizer: Any, tokens: int, seed: int) -> sh.Data:
        return sh.Data.build(
            self.documents,
            tokenizer,
            context=self.options.context,
            train_tokens=tokens,
            heldout_tokens=self.options.heldout_tokens,
            seed=seed,
        )

    def other_bits(self, tokenizer: Any, rows: Sequence[Batch]) -> float | None:
        """Bits per byte of the teacher. rows: in the tokens of `tokenizer`."""
        aligned = AlignedTeacher(self.other, tokenizer)
        windows = []
        for row in rows:
            batch = aligned.rewritten(collate([row])).batch
            window = {name: batch[name][0] for name in ("input_ids", "position_ids")}
            ids_L, positions_L = window.values()
            windows.append({**window, "labels": ids_L.where(positions_L > 0, IGNORED)})
        return own_bits(Student(self.other.model, self.other.tokenizer), windows)

    def prune(self, teacher: LocalTeacher, data: sh.Data, seed: int, **sizes: Any) -> Student:
        """The pruned student, with its tokenizer."""
        tokens = self.options.calibration_tokens
        section = PrunedStudent(start="pruned", calibration_tokens=tokens, **sizes)
        model = Student.load(teacher.source).model  # type: ignore[arg-type]
        tokenizer, _, _ = prune_to(section, model, teacher.tokenizer, data.train, seed=seed)
        return Student(model, tokenizer)


@dataclass(frozen=True)
class Start:
    """What all settings of an experiment share with one seed.

    folder: the student before training. teachers: by setting, if it has one. measure: returns a
    student's figures. teachers_figures: returns the teachers' figures, for comparison.
    """

    folder: Path
    data: sh.Data
    learning_rate: float
    teachers: dict[str, Callable[[], Teacher]]
    measure: Callable[[Student], dict[str, Any]]
    teachers_figures: Callable[[], dict[str, Any]]


# --- experiments ---------------------------------------------------------------------------------


def start_other(shared: Experiment, folder: Path, seed: int) -> Start:
    own, options = shared.own, shared.options
    data = shared.data(own.tokenizer, options.tokens, seed)
    once(folder, lambda: shared.prune(own, data, seed, ffn_size=options.ffn_size).save(folder))
    texts = {"": rows_of(data.heldout)}
    if options.questions is not None:
        texts["questions_"] = rows_of(questions(options, own.tokenizer, seed))
    answers = {name: heldout_answers(own.model, rows) for name, rows in texts.items()}

    def measure(student: Student) -> dict[str, Any]:
        figures = {}
        for name, rows in texts.items():
            found = compare(heldout_answers(student.model, rows), answers[name], own.vocabulary)
            size = supervised_bytes(own.tokenizer, rows)
            figures[f"{name}bits_per_byte"] = bits_per_byte(found, size)
            figures[f"{name}kl"] = found.kl
        return figures

    teachers: dict[str, Callable[[], Teacher]] = {
        "fold": lambda: AlignedTeacher(shared.other, own.tokenizer),
        "own_teacher": lambda: own,
    }

    def of_teachers() -> dict[str, Any]:
        itself = measure(Student(own.model, own.tokenizer))
        found = {}
        for name, rows in texts.items():
            found[f"{name}own_teacher"] = itself[f"{name}bits_per_byte"]
            found[f"{name}other_teacher"] = shared.other_bits(own.tokenizer, rows)
        return found

    return Start(folder, data, options.learning_rate, teachers, measure, of_teachers)


def start_random(shared: Experiment, folder: Path, seed: int) -> Start:
    options = shared.options
    words = learned_tokenizer("\n\n".join(shared.documents), options.random_vocabulary)

    def make() -> None:
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=options.random_width,
            intermediate_size=options.random_width * 8 // 3,
            num_hidden_layers=6,
            num_attention_heads=4,
            tie_word_embeddings=True,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
        )
        Student.random(config, words, seed=seed).save(folder)

    once(folder, make)
    data = shared.data(words, options.random_tokens, seed)

    def measure(student: Student) -> dict[str, Any]:
        return {"bits_per_byte": own_bits(student, rows_of(data.heldout))}

    teachers: dict[str, Callable[[], Teacher]] = {
        "fold": lambda: AlignedTeacher(shared.other, words)
    }

    def of_teachers() -> dict[str, Any]:
        return {"other_teacher": shared.other_bits(words, rows_of(data.heldout))}

    rate = options.random_learning_rate
    return Start(folder, data, rate, teachers, measure, of_teachers)


def start_cut(shared: Experiment, folder: Path, seed: int, *, pruned: bool = True) -> Start:
    """As in a run, the vocabulary is cut first. The student is pruned from the cut teacher, or is
    the cut teacher itself."""
    own, options = shared.own, shared.options
    cut = folder.parent / "cut"

    def make() -> None:
        all_tokens = shared.data(own.tokenizer, options.tokens, seed)
        shared.prune(own, all_tokens, seed, vocabulary=options.kept).save(cut)

    once(cut, make)
    smaller = Teacher.load(cut)
    data = shared.data(smaller.tokenizer, options.tokens, seed)
    if options.training_text is not None:
        text = other_text(options, options.training_text, smaller.tokenizer, options.tokens, seed)
        data = replace(data, train=text)

    def make_student() -> None:
        if pruned:
            student = shared.prune(smaller, data, seed, ffn_size=options.ffn_size)
        else:
            student = Student.load(cut)
        student.save(folder)

    once(folder, make_student)
    whole = AlignedTeacher(own, smaller.tokenizer)
    whole.prepare(
        sh.Distillation(Student.load(folder), teacher=smaller).objective.needs, data.train
    )
    asked = questions(options, smaller.tokenizer, seed)

    def measure(student: Student) -> dict[str, Any]:
        found = {}
        for name, windows in (("kept", data.heldout), ("questions", asked)):
            rows = rows_of(windows)
            found[name] = {"bits_per_byte": own_bits(student, rows), **folded(student, whole, rows)}
        return found

    teachers: dict[str, Callable[[], Teacher]] = {
        "cut_teacher": lambda: smaller,
        "fold": lambda: whole,
    }

    def of_teachers() -> dict[str, Any]:
        return {"cut_teacher": measure(Student(smaller.model, smaller.tokenizer))}

    return Start(folder, data, options.learning_rate, teachers, measure, of_teachers)


def questions(options: argparse.Namespace, tokenizer: Any, seed: int) -> Batches:
    lines = options.questions.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines]
    return other_text(options, asked, tokenizer, options.heldout_tokens, seed)


def other_text(
    options: argparse.Namespace, texts: Any, tokenizer: Any, tokens: int, seed: int
) -> Batches:
    """Windows of text of a different kind. texts: as for `Data.build`."""
    return sh.Data.build(
        texts,
        tokenizer,
        context=options.context,
        train_tokens=tokens,
        heldout_tokens=options.context,
        seed=seed,
    ).train


def once(folder: Path, work: Callable[[], object]) -> None:
    """Do the work that fills a folder, unless it was finished before."""
    finished = folder.with_name(f"{folder.name}.finished")
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        work()
        finished.touch()


def passages(text: str) -> Iterator[str]:
    """Documents of neighboring paragraphs, with at least PASSAGE characters each."""
    found, size = [], 0
    for paragraph in re.split(r"\n\s*\n", text):
        found.append(paragraph)
        size += len(paragraph)
        if size >= PASSAGE:
            yield "\n\n".join(found)
            found, size = [], 0
    if size:
        yield "\n\n".join(found)


def wikitext_articles(text: str) -> list[str]:
    """The sentences of each article as in Wikipedia, without spaces around punctuation. Headings,
    and sentences in which a word is replaced with <unk>, are left out.

    Each article is a document, so the held-out text comes from other articles than the training
    text.
    """
    articles = re.split(r"(?m)^ = [^=].* = $", text)
    return [found for each in articles if (found := sentences_of(each))]


def sentences_of(article: str) -> str:
    lines = (line.strip() for line in article.splitlines() if not line.startswith(" ="))
    found = []
    for line in lines:
        sentences = re.split(r"(?<= [.!?]) (?=\S)", line)
        found.append(" ".join(each for each in sentences if "<unk>" not in each))
    return "\n\n".join(untokenized(each) for each in found if each)


UNTOKENIZED = (
    (r" @(\S)@ ", r"\1"),
    (r" ('(?:s|t|re|ve|ll|d|m|n't)\b)", r"\1"),
    (r'" (.*?) "', r'"\1"'),
    (r"(?<!\S)' (.*?) '(?!\S)", r"'\1'"),
    (r"([(\[$£€#]) ", r"\1"),
    (r" ([,.;:!?%)\]])", r"\1"),
    (r" ([/]) ", r"\1"),
)
"""Patterns that WikiText's tokenization produced, and their replacements."""


def untokenized(text: str) -> str:
    for pattern, plain in UNTOKENIZED:
        text = re.sub(pattern, plain, text)
    return text


def learned_tokenizer(text: str, size: int) -> Any:
    """Byte-level BPE."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


# --- measurements --------------------------------------------------------------------------------


def rows_of(windows: Batches) -> list[Batch]:
    return [windows[i] for i in range(len(windows))]


def own_bits(student: Student, rows: Sequence[Batch]) -> float | None:
    answers = heldout_answers(student.model, rows)
    found = compare(answers, answers, student.vocabulary)
    return bits_per_byte(found, supervised_bytes(student.tokenizer, rows))


@torch.no_grad()
def folded(student: Student, teacher: AlignedTeacher, rows: Sequence[Batch]) -> dict[str, float]:
    """KL of the teacher over shared roots, in nats/token at shared boundaries."""
    total, count, every = 0.0, 0, 0
    student.model.eval()
    for start in range(0, len(rows), BATCH):
        batch = collate(rows[start : start + BATCH])
        (signal,) = teacher.answer(batch).signals
        assert isinstance(signal, FoldedSignal)
        hidden_RLD = hidden_states(student.model, batch["input_ids"], batch["position_ids"])
        rows_ND = supervised_rows(hidden_RLD, positions_of(batch))
        terms = [Term("forward_kl")]
        loss = fused_loss(
            rows_ND, lm_head(student.model), terms, signal=signal, compute_dtype=torch.float32
        )
        total += float(loss.total)
        count += int(signal.covered_N.sum())
        every += len(rows_ND)
    return {"kl": total / count, "covered": count / every}

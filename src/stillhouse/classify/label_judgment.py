"""The teacher's judgment of every text: scored by a local model, or requested from an API.

Shapes: N texts, K contentless texts, C labels.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from stillhouse.atomic_files import write_atomically
from stillhouse.checksums import with_hash, without_hash
from stillhouse.classify.classify_config import ClassifyRecipe, Prior
from stillhouse.classify.label_prompts import CONTENTLESS, LabelPrompt, PromptTokens
from stillhouse.classify.label_scoring import label_scores
from stillhouse.classify.named_label import named_label
from stillhouse.classify.task_texts import PARTS, Texts
from stillhouse.data.words import bare, whole_words
from stillhouse.errors import DataError
from stillhouse.generation.answer_requests import answer_all, estimate_cost
from stillhouse.generation.chat_frame import answer_text
from stillhouse.generation.estimate import Estimate
from stillhouse.generation.generation_config import TextTeacher
from stillhouse.generation.request import Answer, Request, Requests
from stillhouse.generation.text_teacher import DefaultModel, TextSource, text_source
from stillhouse.progress import bar
from stillhouse.shared_work import ALONE, Processes
from stillhouse.tasks.labeled_texts import FEWEST

_ROUNDS = 100
_LEAST = 1e-6
"""Minimum share of texts assumed for a label, when dividing by priors."""


def prior_logits(prior: Prior, train_NC: Tensor, neutral_KC: Tensor) -> Tensor:
    """The log-probability of a label regardless of the text, [C]; to be subtracted.

    content_free: the mean distribution over contentless texts (contextual calibration, Zhao et
    al. 2021, arXiv 2102.09690; as a ratio of probabilities, Holtzman et al. 2021, 2104.08315).
    texts: the mean distribution over the training texts (batch calibration, Zhou et al. 2023,
    arXiv 2309.17249). balanced: the same, repeated on its result, until every label has the same
    share of the training texts: correct only if labels are about equally frequent.
    """
    match prior:
        case "none":
            return torch.zeros(train_NC.shape[1])
        case "content_free":
            return _log_mean(neutral_KC)
        case "texts":
            return _log_mean(train_NC)
        case "balanced":
            total_C = torch.zeros(train_NC.shape[1])
            for _ in range(_ROUNDS):
                total_C = total_C + _log_mean(train_NC - total_C)
            return total_C


def distributions(scores_NC: Tensor, prior_C: Tensor) -> Tensor:
    """softmax(log p(label | text) - prior), [N, C]: proportional to their ratio."""
    return (scores_NC - prior_C).softmax(-1)


def _log_mean(scores_NC: Tensor) -> Tensor:
    return scores_NC.softmax(-1).mean(0).clamp_min(_LEAST).log()


SCORES, CHUNKS = "scores.safetensors", "chunks"
CHUNK = 128
"""Texts whose scores are written together: a process that is killed loses at most this many."""
LEAST_MASS = 0.5
"""Minimum total probability of the tokens that begin a label; below it only the words count."""


@dataclass(frozen=True)
class Judgment:
    """Log-probabilities of labels, [N, C] for each part, NaN if the teacher returned none; and for
    contentless texts, [K, C]. An API's are logarithms of shares, without a prior."""

    train: Tensor
    calibration: Tensor
    test: Tensor
    neutral: Tensor

    def save(self, folder: Path) -> None:
        tensors = {name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}
        save_file(tensors, folder / SCORES)

    @classmethod
    def load(cls, folder: Path) -> Judgment:
        return cls(**load_file(folder / SCORES))

    def prior(self, recipe: ClassifyRecipe) -> Tensor:
        """The prior, estimated only on the training part."""
        kind = "none" if recipe.teacher.api is not None else recipe.task.prior
        known = self.train[~self.train.isnan().any(-1)]
        return prior_logits(kind, known, self.neutral)

    def distribution(self, part: str, recipe: ClassifyRecipe) -> Tensor:
        """The teacher's distribution over the labels, [N, C]; rows of NaN if it returned none."""
        return distributions(getattr(self, part), self.prior(recipe))


# --- a local model ----------------------------------------------------------------------------


def score_texts(
    model: Any, words: PromptTokens, texts: Texts, out: Path, processes: Processes = ALONE
) -> tuple[Judgment, int]:
    """Score all texts, chunk by chunk in `out/chunks`; finished chunks are not scored again.

    words: the prompt in the model's tokens. processes: those that divide the chunks. Returns the
    judgment, and the number of tokens that all of them have read.
    """
    rows = [row.text for row in texts.all] + list(CONTENTLESS)
    folder = out / CHUNKS
    if processes.leads:
        folder.mkdir(exist_ok=True)
    processes.from_main(None)  # until then, the folder may not exist
    numbers = processes.in_turn(range(-(-len(rows) // CHUNK)))
    chunks = {number: rows[number * CHUNK : (number + 1) * CHUNK] for number in numbers}
    found, tokens = {}, 0
    with bar("teacher", total=sum(map(len, chunks.values())), unit="texts") as advance:
        for number, chunk in chunks.items():
            file = folder / f"{number:05d}.scores"
            scores_NC = finished_chunk(file, len(chunk), len(words.labels))
            if scores_NC is None:
                prompts = words.of(chunk)
                tokens += sum(map(len, prompts))
                scores_NC = label_scores(model, prompts, words.labels, advance)
                write_atomically(file, with_hash(save({"scores": scores_NC})))
            else:
                advance(len(chunk))
            found[number] = scores_NC
    of_all = {number: each for part in processes.collect(found) for number, each in part.items()}
    scores_NC = torch.cat([of_all[number] for number in sorted(of_all)])
    sizes = [len(texts.part(name)) for name in PARTS]
    judgment = Judgment(*scores_NC.split([*sizes, len(CONTENTLESS)]))
    return judgment, sum(processes.collect(tokens))


def finished_chunk(file: Path, rows: int, columns: int) -> Tensor | None:
    """The scores that a killed process left, [rows, columns]; None where they are not intact."""
    try:
        scores_NC = load(without_hash(file.read_bytes()))["scores"]
    except (OSError, ValueError, SafetensorError, KeyError):
        return None
    return scores_NC if scores_NC.shape == (rows, columns) else None


def time_teacher(model: Any, words: PromptTokens, texts: Sequence[str]) -> float:
    """Texts per second, including the shared prefix."""
    began = time.perf_counter()
    label_scores(model, words.of(texts), words.labels)
    return len(texts) / (time.perf_counter() - began)


# --- an API ------------------------------------------------------------------------------------


def _requests(
    recipe: ClassifyRecipe, prompt: LabelPrompt, texts: Texts
) -> tuple[TextSource, Requests]:
    """The API, and the requests to it: each text, `samples` times. If the prompt does not name
    the labels, the system prompt lists them."""
    section = recipe.teacher
    if "{labels}" not in prompt.prompt:
        answers = ", ".join(f'"{prompt.answer_for(label)}"' for label in prompt.labels)
        rule = f"Answer with exactly one of these and nothing else: {answers}."
        system = rule if prompt.system is None else f"{prompt.system}\n{rule}"
        prompt = replace(prompt, system=system)
    sampling = section.sampling.model_copy(update={"top_logprobs": section.top_logprobs})
    teacher, default = TextTeacher(api=section.api), DefaultModel(Path())
    source = text_source(teacher, sampling, section.budget, default, recipe.seed)

    def requests() -> Iterator[Request]:
        for row in texts.all:
            messages = prompt.turns(row.text)
            yield from (source.request(messages, n) for n in range(section.samples))

    return source, requests


def estimate_judgment(
    recipe: ClassifyRecipe, prompt: LabelPrompt, texts: Texts, journal: Path, calls: int = 0
) -> Estimate:
    """How much of an API's judgment is in the journal, and what the rest costs. calls: requests
    that are sent first."""
    return estimate_cost(*_requests(recipe, prompt, texts), journal, calls)


def label_by_api(
    recipe: ClassifyRecipe, prompt: LabelPrompt, texts: Texts, journal: Path
) -> tuple[Judgment, dict[str, Any]]:
    """Request what the journal does not have, and read labels from the answers.

    An answer adds a share to its label; with `top_logprobs`, each label's share is the probability
    of the tokens that begin it, if the answer begins with the label that it names and these tokens
    have LEAST_MASS. This is biased: a label below the k most probable tokens gets no share.

    Returns, for the stage's summary, how many answers are labels, not labels, or missing, and
    how many requests must be sent again.
    Raises EndpointError; RunError if the budget is used up; DataError if too few texts of a
    part have a label.
    """
    section = recipe.teacher
    answers = answer_all(*_requests(recipe, prompt, texts), journal, "teacher.budget")
    counts: Counter[str] = Counter()
    shares_NC = torch.zeros(len(texts.all), len(prompt.labels))
    cut_off = 0
    for number, answer in enumerate(answers.found):
        kind, shares = label_shares(answer, prompt, section.top_logprobs is not None)
        counts[kind] += 1
        cut_off += kind == "outside" and answer is not None and answer.finish_reason == "length"
        for column, share in shares.items():
            shares_NC[number // section.samples, column] += share
    sizes = [len(texts.part(name)) for name in PARTS]
    for name, part_NC in zip(PARTS, shares_NC.split(sizes), strict=True):
        _check_labeled(name, int(part_NC.any(-1).sum()), counts, cut_off, journal)
    shares_NC = shares_NC / shares_NC.sum(-1, keepdim=True)  # 0 / 0 is NaN: no answer
    train_NC, calibration_NC, test_NC = shares_NC.log().split(sizes)
    nothing_KC = torch.zeros(0, len(prompt.labels))
    judged = Judgment(train_NC, calibration_NC, test_NC, nothing_KC)
    facts = {"answers": dict(counts), "unanswered": answers.unanswered, **answers.cost()}
    return judged, facts


def _check_labeled(
    part: str, known: int, counts: Counter[str], cut_off: int, journal: Path
) -> None:
    """Raise DataError if too few texts of a part have a label from the teacher. cut_off: answers
    without a label that reached the token limit."""
    if known < FEWEST:
        raise_limit = (
            f"raise teacher.sampling.max_tokens, which cut off {cut_off:,} answers (reasoning can "
            f"take thousands of tokens); or "
        )
        raise DataError(
            f"{known} texts of the {part} part have a label from the teacher, and at least "
            f"{FEWEST} are needed; {counts['label']:,} answers are labels, {counts['outside']:,} "
            f"are not, and {counts['none']:,} requests have no answer",
            where=journal,
            fix=f"{raise_limit if 2 * cut_off > counts['outside'] else ''}read the answers in the "
            "journal, then change task.prompt or task.answer; the same command sends the missing "
            "requests again",
        )


def label_shares(
    answer: Answer | None, prompt: LabelPrompt, use_logprobs: bool
) -> tuple[str, dict[int, float]]:
    """The kind of answer (label, outside, none), and the share of each label's number."""
    if answer is None:
        return "none", {}
    named = named_label(answer_text(answer), prompt)
    if named is None:
        return "outside", {}
    if use_logprobs and answer.logprobs:
        shares = _token_shares(answer.logprobs, prompt, named)
        mass = sum(shares.values())
        if mass >= LEAST_MASS:
            return "label", {number: share / mass for number, share in shares.items()}
    return "label", {named: 1.0}


def _token_shares(
    logprobs: Sequence[Mapping[str, Any]], prompt: LabelPrompt, named: int
) -> dict[int, float]:
    """The probability of each label by its first tokens; empty if the answer does not begin
    with the label that it names.

    If the answer's first token begins several labels, its next tokens distinguish them; a label
    that is complete there gets the remaining probability. If another token begins several labels,
    they share its probability equally, because the tokens that would follow it are unknown.
    """
    answers = [bare(prompt.answer_for(label)) for label in prompt.labels]
    possible, mass, begun = set(range(len(answers))), 1.0, ""
    shares: defaultdict[int, float] = defaultdict(float)
    for position, place in enumerate(logprobs):
        top = place.get("top_logprobs") or []
        choices = {str(one["token"]): math.exp(float(one["logprob"])) for one in top}
        taken = str(place.get("token") or max(choices, key=choices.__getitem__, default=""))
        path = _begins(begun + taken, answers, possible)
        complete = next((n for n in possible if begun and answers[n] == bare(begun)), None)
        if named not in path and named != complete:
            return {}
        spread = 0.0
        last = len(path) < 2 or position + 1 == len(logprobs)
        for token, probability in choices.items():
            fitting = _begins(begun + token, answers, possible - {complete})
            spread += probability if fitting else 0.0
            if token == taken and len(fitting) > 1:
                fitting = {named} if last else set()
            for number in fitting:
                shares[number] += mass * probability / len(fitting)
        if complete is not None:
            shares[complete] += mass * max(0.0, 1 - spread)
        if last:
            break
        possible, mass, begun = path, mass * choices.get(taken, 0.0), begun + taken
    return dict(shares)


def _begins(text: str, answers: Sequence[str], possible: Iterable[int]) -> set[int]:
    """The answers that begin with the text: those in which it ends at a word boundary, or else
    all."""
    start = bare(text)
    fitting = {number for number in possible if start and answers[number].startswith(start)}
    return {number for number in fitting if whole_words(start).match(answers[number])} or fitting

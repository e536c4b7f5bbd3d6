"""Checks for losses with a teacher that has a different tokenizer.

    python -m bench.conformance --tokenizers

They are properties that any such loss should have, whatever its divergence. With equal tokenizers,
the loss is its divergence. It reads the rows that predict each token. It is zero for equal models
and positive for different ones. It depends on the tokens' strings, not on their ids. The end of a
text is learned. Tokens without an equal string contribute. Exact models of the same source have no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.tokenizer_contenders import TRL, Contender, contenders
from bench.tokenizer_problems import Side, TokenizerProblem, problem, side, tokenizer

TOLERANCE = 1e-6
TEXT = " ab ba abb 123"
MERGES = ("Ġ a", "Ġ b", "a b", "Ġa b", "b b")
OTHER_MERGES = ("Ġ a", "Ġa b", "b b", "b a", "1 2", "12 3", "Ġ 123")
WORDS = {" ab": 0.5, " ba": 0.2, " abb": 0.2, " b": 0.1}


def equal_tokenizers(loss: Contender) -> str:
    """The loss is its divergence, averaged over all tokens and the end; so is its gradient."""
    if loss.divergence is None:
        return "it is not a divergence of the two distributions"
    words = tokenizer(MERGES)
    given = problem(words, words, TEXT)
    value, gradient_LV = loss.run(given)
    logits_LV = given.student.logits_LV.clone().requires_grad_()
    log_p, log_q = (z[:-1].log_softmax(-1) for z in (given.teacher.logits_LV, logits_LV))
    expected = loss.divergence(log_p, log_q).mean()
    (wanted_LV,) = torch.autograd.grad(expected, [logits_LV])
    found, right = [], float(expected.detach())
    if abs(float(value) - right) > TOLERANCE * right:
        found.append(f"loss {float(value):.4g} for {right:.4g}")
    off = float((gradient_LV - wanted_LV).norm() / wanted_LV.norm())
    if off > TOLERANCE:
        found.append(f"gradient off by {off:.0%}")
    return ", ".join(found)


def rows_that_predict(loss: Contender) -> str:
    """The first row predicts the first token, and the last row predicts nothing."""
    given = problem(tokenizer(MERGES), tokenizer(OTHER_MERGES), TEXT)
    value, gradient_LV = loss.run(given)
    found = []
    if float(gradient_LV[0].norm()) == 0:
        found.append("the row that predicts the first token has no gradient")
    if float(gradient_LV[-1].norm()) > 0:
        found.append("the row that predicts nothing has a gradient: one position off")
    changed, _ = loss.run(replace(given, teacher=_changed(given.teacher, -1)))
    if abs(float(changed) - float(value)) > TOLERANCE * abs(float(value)):
        found.append("the teacher's row that predicts nothing changes the loss")
    return ", ".join(found)


def _changed(given: Side, row: int) -> Side:
    logits_LV = given.logits_LV.clone()
    logits_LV[row] = logits_LV[row].flip(0)
    return replace(given, logits_LV=logits_LV)


def end_of_text(loss: Contender) -> str:
    given = problem(tokenizer(MERGES), tokenizer(OTHER_MERGES), TEXT)
    _, gradient_LV = loss.run(given)
    return "" if float(gradient_LV[-2].norm()) > 0 else "it is not learned"


def equal_models(loss: Contender) -> str:
    words = tokenizer(MERGES)
    given = problem(words, words, TEXT)
    value, gradient_LV = loss.run(replace(given, student=given.teacher))
    found = [] if abs(float(value)) < TOLERANCE else [f"loss {float(value):.3g}"]
    norm = float(gradient_LV.norm())
    return ", ".join(found + ([] if norm < TOLERANCE else [f"gradient of norm {norm:.3g}"]))


def permuted_probabilities(loss: Contender) -> str:
    """A student that permutes the probabilities of all tokens."""
    words = tokenizer(MERGES)
    given = problem(words, words, TEXT)
    value, _ = loss.run(replace(given, student=_shuffled(given.teacher)))
    return "" if float(value) > 1e-3 else f"loss {float(value):.2g}: blind to which token is which"


def _shuffled(given: Side) -> Side:
    return replace(given, logits_LV=given.logits_LV.roll(1, dims=1))


def permuted_ids(loss: Contender) -> str:
    """The same teacher with permuted token ids."""
    student, teacher, other = tokenizer(MERGES), tokenizer(OTHER_MERGES), tokenizer(OTHER_MERGES, 5)
    given = problem(student, teacher, TEXT)
    value, _ = loss.run(given)
    order = [
        teacher.get_vocab()[token]
        for token, _ in sorted(other.get_vocab().items(), key=lambda pair: pair[1])
    ]
    moved = side(other, TEXT, 0)
    changed, _ = loss.run(
        replace(given, teacher=replace(moved, logits_LV=given.teacher.logits_LV[:, order]))
    )
    off = abs(float(changed) - float(value)) / abs(float(value))
    return "" if off < TOLERANCE else f"loss changes by {off:.1%}"


def tokens_without_partner(loss: Contender) -> str:
    """The teacher is certain of the token " 123"; the student needs " ", "1", "2", "3"."""
    student, teacher = tokenizer(()), tokenizer(("1 2", "12 3", "Ġ 123"))
    given = problem(student, teacher, " 123")
    logits_LV = torch.zeros_like(given.teacher.logits_LV)
    logits_LV[0, given.teacher.ids_L[1]] = 12.0
    flat = replace(given.student, logits_LV=torch.zeros_like(given.student.logits_LV))
    _, gradient_LV = loss.run(
        replace(given, teacher=replace(given.teacher, logits_LV=logits_LV), student=flat)
    )
    first = int(given.student.ids_L[1])
    raised = float(gradient_LV[0, first]) < 0
    alone = int(gradient_LV[0].argmin()) == first
    if raised and alone:
        return ""
    return "the first token of the student is not the one that is raised"


def exact_models(loss: Contender) -> str:
    """Both models describe the same word source exactly: nothing is left to learn."""
    student, teacher = tokenizer(MERGES), tokenizer(OTHER_MERGES)
    given = problem(student, teacher, " ab", seen=list(WORDS))
    sides = []
    for each in (given.student, given.teacher):
        p_V = torch.zeros(each.logits_LV.shape[1], dtype=torch.float64)
        for word, share in WORDS.items():
            p_V[each.words(word, add_special_tokens=False)["input_ids"][0]] += share
        logits_LV = torch.full_like(each.logits_LV, -40.0)
        logits_LV[0] = p_V.clamp_min(1e-17).log()
        for row, token in enumerate(each.ids_L[2:].tolist(), start=1):
            logits_LV[row, token] = 0.0
        sides.append(replace(each, logits_LV=logits_LV))
    if float(loss.run(given)[1][0].norm()) == 0:
        return "a word's start has no gradient under any models"
    _, gradient_LV = loss.run(TokenizerProblem(sides[0], sides[1], given.seen))
    norm = float(gradient_LV[0].norm())
    return "" if norm < 1e-4 else f"a gradient of norm {norm:.2g}: biased"


CHECKS: dict[str, Callable[[Contender], str]] = {
    "equal tokenizers": equal_tokenizers,
    "rows that predict": rows_that_predict,
    "the end of a text": end_of_text,
    "equal models": equal_models,
    "permuted probabilities": permuted_probabilities,
    "permuted ids": permuted_ids,
    "tokens without partner": tokens_without_partner,
    "exact models of one source": exact_models,
}


def conform(loss: Contender) -> dict[str, str]:
    """Run all checks; return each difference, or an empty string if there is none."""
    found = {}
    for title, check in CHECKS.items():
        try:
            found[title] = check(loss)
        except Exception as error:  # an exception of any library is a finding
            found[title] = f"raises {type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return found


def report(python: Path | None) -> int:
    """Print the differences; return 1 if Stillhouse differs. python: interpreter with TRL."""
    trl = None if python is None else TRL(python)
    failed = False
    for name, loss in contenders(trl).items():
        found = conform(loss)
        differs = {title: what for title, what in found.items() if what}
        print(f"{name}: {len(found) - len(differs)} of {len(found)} checks agree")
        for title, what in differs.items():
            print(f"    {title}: {what}")
        failed |= name == "stillhouse" and bool(differs)
    if trl is not None:
        trl.close()
    return int(failed)

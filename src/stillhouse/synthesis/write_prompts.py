"""Makes prompts without a file: combined from templates and values, or written by the teacher.

Written prompts come from a fixed sequence of requests, each of which shows different examples. The
answers in the journal determine the prompts, so a stopped run continues with the same ones.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from stillhouse.data.words import words
from stillhouse.errors import DataError, RunError, StillhouseError
from stillhouse.generation.answer_requests import send_missing
from stillhouse.generation.budget import Spending
from stillhouse.generation.chat_frame import answer_text, user_turn
from stillhouse.generation.estimate import estimate_requests
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.generation.text_teacher import TextSource
from stillhouse.progress import note
from stillhouse.synthesis.near_duplicates import NearDuplicates
from stillhouse.synthesis.prompts import Prompt
from stillhouse.synthesis.synthesize_config import CombineRecipe, WriteRecipe, names_in

MOST_TIMES = 3
"""Maximum number of requests, as a multiple of the number needed if all prompts are different."""
_ASK = """\
Write {each} different prompts that people could send to an assistant.

What they are to be: {what}
{examples}
Write one prompt a line, without numbers, and no answers."""
_MARK = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,4}[.):、．]\s*)")
"""A list marker at the beginning of a line."""
_MOST_CHARACTERS = 4000


def combinations(section: CombineRecipe) -> list[str]:
    """Fill every template with every combination of its values, in order."""
    texts = []
    for template in section.templates:
        names = names_in(template)
        for chosen in itertools.product(*(section.values[name] for name in names)):
            texts.append(template.format(**dict(zip(names, chosen, strict=True))))
    return texts


def combined(section: CombineRecipe, seed: int) -> Iterator[Prompt]:
    """Yield the combinations as prompts, shuffled so that the first ones are a random sample."""
    texts = combinations(section)
    random.Random(seed).shuffle(texts)
    for number, text in enumerate(texts):
        yield Prompt(user_turn(text), f"combination {number}")


@dataclass(frozen=True)
class Writer:
    """Makes requests for new prompts, and reads the prompts from their answers in the journal, if
    there is one."""

    section: WriteRecipe
    combine: CombineRecipe
    teacher: TextSource
    examples: tuple[str, ...]
    seed: int
    journal: Journal | None

    @property
    def fewest(self) -> int:
        """Number of requests needed if all prompts are different."""
        return -(-self.section.count // self.section.per_request)

    def requests(self, first: int = 0, last: int | None = None) -> Iterator[Request]:
        """Yield requests number first to last - 1; by default, all that may be sent."""
        texts = combinations(self.combine)
        random.Random(self.seed).shuffle(texts)
        for number in range(first, self.fewest * MOST_TIMES if last is None else last):
            ask = self._ask(texts[number % len(texts)], number)
            yield self.teacher.request(user_turn(ask), number)

    def _ask(self, what: str, number: int) -> str:
        chance = random.Random(f"{self.seed} {number}")
        count = min(self.section.examples, len(self.examples))
        shown = "".join(f"- {text}\n" for text in chance.sample(self.examples, count))
        examples = f"\nSome that are there already:\n{shown}" if shown else ""
        return _ASK.format(each=self.section.per_request, what=what, examples=examples)

    @property
    def spent(self) -> Spending:
        """The cost of all requests so far."""
        return estimate_requests(self.requests(), self.journal, self.teacher.price).spent

    def prompts(self) -> Iterator[Prompt]:
        """Yield the distinct prompts in the journal's answers, up to `count`."""
        seen = NearDuplicates(self.section.max_similarity)
        for text in self.examples:
            seen.add(words(text))
        kept = 0
        for request in self.requests():
            answer = None if self.journal is None else self.journal.get(request.key)
            if answer is None:
                continue
            text = answer_text(answer)
            for line in prompt_lines(text, complete=answer.finish_reason != "length"):
                if seen.add(words(line)) is not None:
                    continue
                kept += 1
                yield Prompt(user_turn(line), f"written prompt {kept}")
                if kept == self.section.count:
                    return


def prompt_lines(text: str, *, complete: bool) -> Iterator[str]:
    """Yield the prompts in an answer, one per line, without list markers; the last only if the
    answer is complete."""
    lines = [_MARK.sub("", line).strip().strip('"') for line in text.splitlines()]
    lines = [line for line in lines if line]
    for line in lines if complete else lines[:-1]:
        # A line that ends with a colon introduces the list.
        introduces = line.endswith((":", "："))
        if len(words(line)) >= 2 and len(line) <= _MOST_CHARACTERS and not introduces:
            yield line


def write_prompts(writer: Writer, journal: Journal, answers: Spending) -> Spending:
    """Send requests until there are enough distinct prompts, or MOST_TIMES as many requests as
    needed were sent; return the cost of all requests.

    answers: the cost of answers to earlier prompts, under the same budget. Raises EndpointError;
    if there are no prompts, RunError if the budget is the reason, and DataError otherwise.
    """
    most, last = writer.fewest * MOST_TIMES, 0
    stopped = False
    wanted = writer.section.count
    while (found := sum(1 for _ in writer.prompts())) < wanted and last < most and not stopped:
        first, lacking = last, wanted - found
        last = min(most, first + -(-lacking // writer.section.per_request))
        stopped = send_part(writer, first, last, journal, answers)
    if found == 0:
        raise _no_prompts(writer, journal, out_of_budget=stopped)
    if found < wanted:
        why = ", because the budget is used up: raise synthesize.budget" if stopped else ""
        note(f"only {found:,} of {wanted:,} distinct prompts were written{why}")
    return writer.spent


def _no_prompts(writer: Writer, journal: Journal, *, out_of_budget: bool) -> StillhouseError:
    if out_of_budget:
        return RunError(
            "the budget is used up before the teacher has written any usable prompt",
            where=journal.path,
            fix="raise synthesize.budget; no request is paid for twice",
        )
    answers = [journal.get(request.key) for request in writer.requests()]
    ends = [answer.finish_reason for answer in answers if answer is not None]
    fix = "read its answers in the journal, then improve synthesize.prompts.combine"
    if 2 * ends.count("length") > len(ends):
        fix = (
            f"raise synthesize.prompts.write.max_tokens, which cut off {ends.count('length'):,} of "
            f"its {len(ends):,} answers"
        )
    return DataError("the teacher wrote no usable prompts", where=journal.path, fix=fix)


def send_part(writer: Writer, first: int, last: int, journal: Journal, answers: Spending) -> bool:
    """Send the writer's requests first to last - 1; return whether the budget stopped any."""
    part = partial(writer.requests, first, last)
    return send_missing(writer.teacher, part, journal, writer.spent + answers)[1].out_of_budget

"""Prompts that no file holds: templates combined with values, or written by the teacher itself.

Written ones come from a fixed row of requests, each of which shows other examples; their answers
are in the journal. What the journal holds decides the prompts, so that a run that was stopped goes
on with the same ones.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter

from stillhouse.errors import DataError
from stillhouse.generation.budget import Spending
from stillhouse.generation.generation_config import SamplingRecipe
from stillhouse.generation.journal import Journal
from stillhouse.generation.request import Request
from stillhouse.progress import note
from stillhouse.synthesis.estimate import known_before
from stillhouse.synthesis.filters_config import FiltersRecipe
from stillhouse.synthesis.near_duplicates import NearDuplicates
from stillhouse.synthesis.prompts import Prompt, answer_text, read_prompts, text_of, words
from stillhouse.synthesis.prompts_config import CombineRecipe, PromptsRecipe, WriteRecipe
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.synthesis.text_teacher import Origins, TextSource, text_teacher

MOST_TIMES = 3
"""How many times the requests that would do are made at most, where prompts come out alike."""
_ASK = """\
Write {each} different prompts that people could send to an assistant.

What they are to be: {what}
{examples}
Write one prompt a line, without numbers, and no answers."""
_MARK = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,4}[.):、．]\s*)")
"""What lists put before a line."""
_MOST_CHARACTERS = 4000


def combinations(section: CombineRecipe) -> list[str]:
    """Every template with every combination of the values that it names, in their order."""
    texts = []
    for template in section.templates:
        found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        names = list(dict.fromkeys(found))
        for chosen in itertools.product(*(section.values[name] for name in names)):
            texts.append(template.format(**dict(zip(names, chosen, strict=True))))
    return texts


def combined(section: CombineRecipe, seed: int) -> Iterator[Prompt]:
    """The combinations as prompts, shuffled, so that any first ones are a fair sample."""
    texts = combinations(section)
    random.Random(seed).shuffle(texts)
    for number, text in enumerate(texts):
        yield Prompt(({"role": "user", "content": text},), f"combination {number}")


@dataclass(frozen=True)
class Writer:
    """What the teacher is asked for new prompts, and what is made of its answers."""

    section: WriteRecipe
    combine: CombineRecipe
    teacher: TextSource
    examples: tuple[str, ...]
    seed: int

    @property
    def fewest(self) -> int:
        """Requests that would do if all prompts were different."""
        return -(-self.section.count // self.section.each)

    def requests(self, first: int = 0, last: int | None = None) -> Iterator[Request]:
        """Those with the numbers first to last - 1; by default all that may be made."""
        texts = combinations(self.combine)
        random.Random(self.seed).shuffle(texts)
        for number in range(first, self.fewest * MOST_TIMES if last is None else last):
            ask = self._ask(texts[number % len(texts)], number)
            yield self.teacher.request(({"role": "user", "content": ask},), number)

    def _ask(self, what: str, number: int) -> str:
        chance = random.Random(f"{self.seed} {number}")
        count = min(self.section.examples, len(self.examples))
        shown = "".join(f"- {text}\n" for text in chance.sample(self.examples, count))
        examples = f"\nSome that are there already:\n{shown}" if shown else ""
        return _ASK.format(each=self.section.each, what=what, examples=examples)

    def prompts(self, journal: Journal | None) -> Iterator[Prompt]:
        """The different ones among what the journal holds, up to `count`."""
        seen = NearDuplicates(self.section.similar)
        for text in self.examples:
            seen.add(words(text))
        kept = 0
        for request in self.requests():
            answer = None if journal is None else journal.get(request.key)
            if answer is None:
                continue
            text = answer_text(answer, keep_reasoning=False)
            for line in prompt_lines(text, whole=answer.finish_reason != "length"):
                if seen.add(words(line)) is not None:
                    continue
                kept += 1
                yield Prompt(({"role": "user", "content": line},), f"written prompt {kept}")
                if kept == self.section.count:
                    return


def prompt_lines(text: str, *, whole: bool) -> Iterator[str]:
    """The prompts in an answer, a line each, without list marks. whole: the last line too."""
    lines = [_MARK.sub("", line).strip().strip('"') for line in text.splitlines()]
    lines = [line for line in lines if line]
    for line in lines if whole else lines[:-1]:
        # A line that ends with a colon introduces the list.
        introduces = line.endswith((":", "："))
        if len(words(line)) >= 2 and len(line) <= _MOST_CHARACTERS and not introduces:
            yield line


def open_writer(
    whole: SynthesizeRecipe, origins: Origins, seed: int, *, weights: bool = True
) -> Writer | None:
    """None where the recipe's prompts are not written. weights: as in `text_teacher`.

    Raises DataError about the file of examples.
    """
    section = whole.prompts
    if section.write is None:
        return None
    assert section.combine is not None
    sampling = SamplingRecipe(
        temperature=section.write.temperature, max_tokens=section.write.max_tokens
    )
    writing = whole.model_copy(update={"sampling": sampling, "filters": FiltersRecipe()})
    teacher = text_teacher(writing, origins, seed, weights=weights)
    examples: list[str] = []
    if section.path is not None:
        path = origins.base / Path(section.path).expanduser()
        read = read_prompts(path, format=section.format, key=section.key)
        # A prompt is shown as one line.
        examples = [" ".join(text_of(prompt.messages).split()) for prompt in read]
    return Writer(section.write, section.combine, teacher, tuple(examples), seed)


@dataclass(frozen=True)
class Part:
    """Some of a writer's requests, each time they are gone through."""

    writer: Writer
    first: int
    last: int

    def requests(self) -> Iterator[Request]:
        return self.writer.requests(self.first, self.last)


def write_prompts(writer: Writer, journal: Journal, answers: Spending) -> Spending:
    """Asks until there are enough different prompts, or MOST_TIMES the requests are made; what all
    of them took. answers: what the answers to prompts took that were written before, under the same
    budget. Raises EndpointError; DataError where no prompt came out."""
    most, last = writer.fewest * MOST_TIMES, 0
    stopped = False
    while (found := sum(1 for _ in writer.prompts(journal))) < writer.section.count:
        if stopped or last == most:
            break
        lacking = writer.section.count - found
        part = Part(writer, last, min(most, last + -(-lacking // writer.section.each)))
        last = part.last
        known = known_before(part.requests(), journal, writer.teacher.price)
        if known.missing:
            spent = known_before(writer.requests(), journal, writer.teacher.price).spent
            known = replace(known, spent=spent + answers)
            _, _, stopped = writer.teacher.answer(part, journal, known)
    if found == 0:
        raise DataError(
            "the teacher wrote no prompt that can be used",
            where=journal.path,
            fix="look at its answers there, then mend synthesize.prompts.combine",
        )
    if found < writer.section.count:
        note(f"{found:,} different prompts were written, of {writer.section.count:,} wanted")
    return known_before(writer.requests(), journal, writer.teacher.price).spent


def prompt_source(
    section: PromptsRecipe, base: Path, seed: int, writer: Writer | None, journal: Journal | None
) -> Callable[[], Iterator[Prompt]]:
    """The recipe's prompts, each time they are gone through."""

    def read() -> Iterator[Prompt]:
        if writer is not None:
            found = writer.prompts(journal)
        elif section.combine is not None:
            found = combined(section.combine, seed)
        else:
            assert section.path is not None
            path = base / Path(section.path).expanduser()
            return read_prompts(path, format=section.format, key=section.key, limit=section.limit)
        return itertools.islice(found, section.limit)

    return read

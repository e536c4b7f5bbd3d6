"""Recognizes answers that refuse to answer, by what they refuse.

"I can't help with that" refuses an act of answering; "I can't wait to see you" does not. A letter,
a dialogue or a quotation that declines something is an answer. So is a text that states what it
cannot do and then does what was requested: "I can't give medical advice, but most headaches ...". A
text that only offers something else ("... but I can explain how locks work") is a refusal.
"""

from __future__ import annotations

import re

from stillhouse.synthesis import refusal_phrases as phrases

SENTENCES, CHARACTERS = 4, 800
"""How much of an answer's beginning is searched."""
FOLLOWS = 80
"""Characters after "but" that make an answer of a text that began as a refusal."""


def refusing_words(text: str) -> str | None:
    """The words by which an answer (without its reasoning) refuses, or None.

    Recognizes English, and how refusals commonly begin in German, French, Spanish, Chinese and
    Japanese. A lecture that does not state a refusal is not recognized.
    """
    text = re.sub("[’‘´ʼ]", "'", text.strip()).replace("“", '"').replace("”", '"')
    foreign = phrases.OTHER_LANGUAGES.match(text)
    if foreign is not None:
        return foreign.group()
    plain = phrases.MARKUP.sub("", text).strip()
    if (
        text.startswith(("```", "{", "["))
        or phrases.GREETING.match(plain)
        or phrases.DIALOGUE.search(plain)
    ):
        return None
    if plain.startswith('"') and plain.find('"', 1) < len(plain) - 1:
        return None
    opening = phrases.QUOTED.sub('""', plain[:CHARACTERS])
    parts = [" ".join(part.lower().split()) for part in phrases.SENTENCE_END.split(opening)]
    sentences, opening = parts[:SENTENCES], opening.lower()
    letter = phrases.CLOSING.search(plain) is not None and not phrases.MODEL_OR_REQUEST.search(
        opening
    )
    if letter or phrases.COMPLIES.match(opening):
        return None
    return _found(sentences, opening)


def _found(sentences: list[str], opening: str) -> str | None:
    """opening: the sentences and what follows them, for hints at a refusal."""
    for number, sentence in enumerate(sentences):
        following = sentences[number + 1 :]
        found = phrases.REFUSAL.search(sentence) or phrases.STATEMENT.search(sentence)
        if found is None and phrases.CUES.search(opening):
            found = phrases.LIKELY.search(sentence)
        if found is None and len(" ".join(following)) < FOLLOWS:
            found = phrases.DISCLAIMER.search(sentence)
        if found is not None and not phrases.EVERYDAY.search(sentence):
            answers = _answers(sentence[found.end() :], following)
            return None if answers else found.group().strip(" ,;:")
    return None


def _answers(rest: str, following: list[str]) -> bool:
    """Whether the rest of a text does what was requested. rest: the rest of the sentence that
    refuses. following: the sentences after it."""
    after = " ".join(following)
    near = f"{rest} {' '.join(following[:1])}"
    if phrases.DELIVERS.search(near) and not phrases.ALTERNATIVE.search(near):
        return True
    found = phrases.CONTRAST.search(rest) or phrases.CONTRAST.match(after)
    return found is not None and len(f"{found.group()} {after}") >= FOLLOWS

"""The built-in corpus: CPython's language reference, which every Python includes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from stillhouse.data.documents import Document

HEADING = re.compile(r"^(?=[^\n]*\S[^\n]*\n([*=~^-])\1{2,}\n)", re.MULTILINE)
SHORTEST = 400
"""Characters; a shorter section is joined with the next one."""


def python_reference() -> Iterator[Document]:
    """One document per section, topic by topic; about 465 kB of English prose and code.

    Topics quote each other's sections. As separate documents these are recognized as duplicates,
    and held-out text comes from many places rather than from two long topics.
    """
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        for number, section in enumerate(_sections(topics[topic]), 1):
            yield Document(section + "\n", where=f"python-reference:{topic}, section {number}")


def _sections(text: str) -> Iterator[str]:
    held = ""
    starts = [0, *(match.start() for match in HEADING.finditer(text) if match.start()), len(text)]
    for start, end in pairwise(starts):
        held += text[start:end]
        if len(held) >= SHORTEST:
            yield held.strip()
            held = ""
    if held.strip():
        yield held.strip()

"""The built-in corpus: CPython's language reference, which comes with every Python."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.data.documents import Document


def python_reference() -> Iterator[Document]:
    """One document a topic, sorted by topic; about 465 kB of English prose and code."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        text = topics[topic].strip()
        if text:
            yield Document(text + "\n", where=f"python-reference:{topic}")

"""The section `data`: sources of training text, and how they become windows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stillhouse.field_types import Context, PathText, Tokens
from stillhouse.section import Section


class _Source(Section):
    limit: Tokens | None = Field(
        None, description="Use only the first documents (or rows), at most this many."
    )
    tokens: Tokens | None = Field(
        None,
        description="Use about this many tokens of this source, from documents sampled with the "
        "seed; null: all.",
    )


class CorpusSource(_Source):
    """Text that every Python installation includes; nothing is downloaded."""

    kind: Literal["corpus"]
    name: Literal["python-reference"] = "python-reference"


class TextSource(_Source):
    """Plain text files."""

    kind: Literal["text"]
    path: PathText = Field(description="A file, a folder of .txt files, or a glob.")
    documents: Literal["file", "blank-line", "line"] = Field(
        "file", description="What separates the documents in a file."
    )


class FileSource(_Source):
    """Rows with `text`, with `messages`, or with `prompt` and `completion`."""

    kind: Literal["file", "jsonl", "json", "csv", "tsv", "parquet"] = Field(
        description="The files' format. file: decide by the extension; a plain text file is one "
        "document."
    )
    path: PathText = Field(description="A file, a folder, or a glob; files may be compressed.")
    text_key: str = Field("text", description="The key or column that holds plain text.")


class HubSource(_Source):
    """A dataset on the Hugging Face Hub, or a local folder that `datasets` can load."""

    kind: Literal["hub"]
    dataset: PathText
    config: str | None = None
    split: str = "train"
    text_key: str = "text"


Source = Annotated[
    CorpusSource | TextSource | FileSource | HubSource,
    Field(discriminator="kind"),
]


ControlText = Literal["text", "tokens"]


class WindowsRecipe(Section):
    """How text becomes windows of tokens."""

    context: Context = Field(1024, description="Tokens in one training window.")
    packing: Literal["isolated", "none"] = Field(
        "isolated",
        description="isolated: documents share a window but cannot attend to each other; "
        "none: one document per window, padded.",
    )
    train_tokens: Tokens | None = Field(
        None, description="Use about this many training tokens; null: all."
    )
    heldout_tokens: Tokens = Field(8192, description="Hold out about this many tokens.")
    long_rows: Literal["error", "truncate", "drop"] = Field(
        "error",
        description="What to do with a chat, or a prompt with its completion, that is longer than "
        "the context.",
    )
    control_tokens: ControlText | None = Field(
        None,
        description="How to read strings of control tokens in a text, such as <|im_end|>; null: as "
        "text, but reject plain text that begins or ends with one.",
    )


class DataRecipe(WindowsRecipe):
    sources: list[Source] = Field(min_length=1, description="Sources of the training text.")
    heldout_sources: list[Source] = Field(
        default=[],
        description="Sources of the held-out text; if empty, documents are split off `sources`.",
    )

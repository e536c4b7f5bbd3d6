"""The section `data`: sources of training text, and the windows that they become."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stillhouse.field_types import Context, PathText, Tokens
from stillhouse.section import Section


class _Source(Section):
    limit: Tokens | None = Field(
        None, description="Use at most this many documents, or rows: the first ones."
    )
    tokens: Tokens | None = Field(
        None,
        description="Use about this many tokens of this source, of documents that the seed draws; "
        "null: all.",
    )


class CorpusSource(_Source):
    """Text that every Python installation includes: no download."""

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
    """Rows with `text`, or `messages`, or `prompt` and `completion`."""

    kind: Literal["file", "jsonl", "json", "csv", "tsv", "parquet"] = Field(
        description="The files' format; file: by the extension, and a plain text file is one "
        "document."
    )
    path: PathText = Field(description="A file, a folder or a glob; compressed ones are read too.")
    text_key: str = Field("text", description="The key or column that holds plain text.")


class HubSource(_Source):
    """A dataset of the Hugging Face Hub, or a local folder that `datasets` can load."""

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
        description="isolated: documents share a window and never see each other; "
        "none: one document per window, padded.",
    )
    train_tokens: Tokens | None = Field(
        None, description="Stop after about this many training tokens; null: all."
    )
    heldout_tokens: Tokens = Field(8192, description="About how many tokens to hold out.")
    long_rows: Literal["error", "truncate", "drop"] = Field(
        "error", description="What to do with a chat row that is longer than the context."
    )
    control_tokens: ControlText | None = Field(
        None,
        description="Whether strings of control tokens in a text, such as <|im_end|>, are text or "
        "tokens; null: text, and a plain text that begins or ends with one is an error.",
    )


class DataRecipe(WindowsRecipe):
    sources: list[Source] = Field(min_length=1, description="Sources of the training text.")
    heldout_sources: list[Source] = Field(
        default=[], description="Text for evaluation; without it, documents are split off."
    )

"""What a text teacher needs before any request is sent: a key, packages, a template that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from stillhouse.errors import EndpointError
from stillhouse.finding import Finding, finding_of
from stillhouse.generation.generation_config import ApiTeacher, VllmTeacher
from stillhouse.generation.request import Message, endpoint_of
from stillhouse.generation.template_check import (
    NOTHING,
    FrameKeys,
    rendered_prompt,
    require_template,
)
from stillhouse.generation.text_generator import require_chat_template
from stillhouse.generation.text_teacher import LocalText, TextSource
from stillhouse.generation.vllm_engine import lacks
from stillhouse.teachers.api_keys import api_key
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.planned_model import check_model_folder


def require_key(api: ApiTeacher, key: str) -> Iterator[Finding]:
    """An error if the API's key is missing. key: the recipe's key of the source."""
    try:
        api_key(api.key_env, where=endpoint_of(api.base_url), setting=f"{key}.api.key_env")
    except EndpointError as error:
        yield finding_of(error)


def require_source(
    source: TextSource,
    chats: Iterable[tuple[Sequence[Message], str]],
    *,
    whose: str,
    key: str,
    keys: FrameKeys = NOTHING,
) -> Iterator[Finding]:
    """chats: as they will be sent, each with its place. whose: the model, in words. key: the
    recipe's key of the source. keys: as in `require_template`.

    Raises StillhouseError if no request can succeed; yields a missing key and what vLLM lacks.
    """
    if not isinstance(source, LocalText):
        yield from require_key(source.api, key)
        return
    if isinstance(source.own, VllmTeacher):
        # vLLM loads models that transformers may not, so the folder itself is not checked.
        for level, text, fix in lacks(source.own, source.default.base):
            yield Finding(level, "vLLM", text, fix)
    else:
        check_model_folder(source.source.path, trust_remote_code=source.default.trust_remote_code)
    path = source.source.path
    tokenizer = load_tokenizer(path, trust_remote_code=source.default.trust_remote_code)
    require_chat_template(tokenizer)
    require_template(
        rendered_prompt(tokenizer),
        chats,
        whose=whose,
        where=path,
        keys=keys,
    )

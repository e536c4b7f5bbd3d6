"""Teachers whose signals are recorded with vLLM, on a server or on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stillhouse.generation.vllm_engine import opened_hidden_states
from stillhouse.hardware import default_device
from stillhouse.language_model.job import Job, configs
from stillhouse.planning.model_size import config_size
from stillhouse.signals.encodings import Encoding, Hidden, TopK
from stillhouse.teachers.hidden_teacher import (
    HiddenStateServer,
    HiddenStateSource,
    HiddenStateTeacher,
)
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.teachers.served_teacher import ServedTeacher
from stillhouse.teachers.shared_vocabulary import check_rows
from stillhouse.teachers.source_tokenizers import head_rows
from stillhouse.teachers.stored_head import load_head
from stillhouse.teachers.teacher import Teacher


@contextmanager
def engine_teacher(job: Job, encoding: Encoding) -> Iterator[Teacher]:
    """Open the teacher of `signals.server` or `signals.vllm` for the block.

    For encodings other than top_k (on a server) and hidden, loads the teacher's LM head, onto the
    first GPU if there is one. Raises ModelError, EndpointError.
    """
    section = job.recipe.signals
    assert section is not None
    only_hidden = isinstance(encoding, Hidden)
    if section.server is not None:
        yield server_teacher(job, encoding, with_head=not only_hidden)
        return
    assert section.vllm is not None
    last = int(configs(job)[1].get_text_config().num_hidden_layers)
    with opened_hidden_states(
        section.vllm,
        job.teacher,
        base=job.base,
        layers=encoding.layers if isinstance(encoding, Hidden) else (),
        last=last,
        seed=job.recipe.seed,
    ) as source:
        yield _teacher(job, source, with_head=not only_hidden)


def server_teacher(job: Job, encoding: Encoding, *, with_head: bool = True) -> Teacher:
    """Return the teacher of `signals.server`, which returns top tokens for top_k and otherwise
    hidden states.

    with_head: whether to load its LM head, for full distributions. Raises ModelError,
    EndpointError.
    """
    section = job.recipe.signals
    assert section is not None
    assert section.server is not None
    config = configs(job)[1]
    text = config.get_text_config()
    if isinstance(encoding, TopK):
        parameters = config_size(config).active
        return ServedTeacher(
            section.server, k=encoding.k, vocabulary=job.vocabulary, parameters=parameters
        )
    dtype = job.precision.dtype
    served = torch.float32 if dtype == torch.float32 else torch.bfloat16
    last, width = int(text.num_hidden_layers), int(text.hidden_size)
    source = HiddenStateServer(section.server, last=last, width=width, dtype=served)
    return _teacher(job, source, with_head=with_head)


def _teacher(job: Job, source: HiddenStateSource, *, with_head: bool) -> HiddenStateTeacher:
    config, head = configs(job)[1], None
    if with_head:
        head = load_head(job.teacher, dtype=job.precision.dtype)
        head = head.to(default_device())
    vocabulary, tokenizer = job.vocabulary, None
    if job.folded:
        tokenizer = load_tokenizer(job.teacher)
        vocabulary = check_rows(tokenizer, head_rows(job.teacher), "teacher")
    return HiddenStateTeacher(
        source,
        config,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        head=head,
        parameters=config_size(config).active,
    )

"""The teacher whose signals are recorded, if vLLM runs it: on a server or on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stillhouse.generation.vllm_hidden import opened_hidden_states
from stillhouse.hardware import choose_precision, default_device
from stillhouse.language_model.job import Job, configs, planned_size
from stillhouse.signals.encodings import Encoding, Hidden, TopK
from stillhouse.teachers.hidden_server import HiddenStateServer
from stillhouse.teachers.hidden_teacher import HiddenStateSource, HiddenStateTeacher
from stillhouse.teachers.served_teacher import ServedTeacher
from stillhouse.teachers.stored_head import load_head
from stillhouse.teachers.teacher import Teacher


@contextmanager
def engine_teacher(job: Job, encoding: Encoding) -> Iterator[Teacher]:
    """The teacher of `signals.server` or `signals.vllm`, until the end of the block.

    For encodings other than top_k (on a server) and hidden, the teacher's head is loaded, on the
    first GPU if there is one. Raises ModelError, EndpointError.
    """
    section = job.recipe.signals
    assert section is not None
    config = configs(job)[1]
    text = config.get_text_config()
    parameters = planned_size(config).head_once
    if section.server is not None and isinstance(encoding, TopK):
        yield ServedTeacher(
            section.server, k=encoding.k, vocabulary=job.vocabulary, parameters=parameters
        )
        return
    device = default_device()
    dtype = choose_precision(job.recipe.train.precision, device).dtype

    def teacher(source: HiddenStateSource) -> HiddenStateTeacher:
        head = None
        if not isinstance(encoding, Hidden):
            code = job.trust_remote_code
            head = load_head(job.teacher.path, dtype=dtype, trust_remote_code=code).to(device)
        return HiddenStateTeacher(
            source, config, vocabulary=job.vocabulary, head=head, parameters=parameters
        )

    last = int(text.num_hidden_layers)
    if section.server is not None:
        served = torch.float32 if dtype == torch.float32 else torch.bfloat16
        yield teacher(
            HiddenStateServer(section.server, last=last, width=text.hidden_size, dtype=served)
        )
        return
    assert section.vllm is not None
    with opened_hidden_states(
        section.vllm,
        job.teacher.path,
        base=job.base,
        layers=encoding.layers if isinstance(encoding, Hidden) else (),
        last=last,
        seed=job.recipe.seed,
        trust_remote_code=job.trust_remote_code,
    ) as source:
        yield teacher(source)

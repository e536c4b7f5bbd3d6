"""The stage that records the teacher's signals, and the teacher used for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import stillhouse.signals
import stillhouse.teachers
from stillhouse.errors import SignalError
from stillhouse.generation.request import api_described
from stillhouse.hardware import default_device, peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.engine_teacher import engine_teacher, server_teacher
from stillhouse.language_model.job import (
    Job,
    full_job,
    planned_objective,
    signals_encoding,
    within_vocabulary,
)
from stillhouse.language_model.roots_stage import run_roots
from stillhouse.launch import leads
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, Stage, StagePlan
from stillhouse.signals import LMHead
from stillhouse.signals.encodings import Encoding, FrozenHead, Hidden
from stillhouse.signals.folded_store import ROOTS
from stillhouse.signals.manifest import SHARDS, Settings, read_manifest
from stillhouse.signals.store import Store, open_store
from stillhouse.students.student import Student
from stillhouse.teachers.backbone import lm_head
from stillhouse.teachers.hashing import code_sha256
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.local_teacher import LocalTeacher, load_teacher
from stillhouse.teachers.model_source import ModelSource
from stillhouse.teachers.record_store import chosen_encoding, folded_identity, record
from stillhouse.teachers.several_teachers import combined
from stillhouse.teachers.sharded_teacher import ShardedTeacher, load_sharded_teacher
from stillhouse.teachers.shared_vocabulary import tokenizer_identity
from stillhouse.teachers.stored_head import head_sha256, load_head
from stillhouse.teachers.stored_teacher import StoredTeacher, recorded_temperature
from stillhouse.teachers.teacher import Teacher
from stillhouse.training.train import shards

STORE = "store"
SHARD_FILES = f"{STORE}/{SHARDS}/*"


@dataclass(frozen=True)
class StoredSignals:
    """A finished signal store. key: identifies its content."""

    path: Path
    key: str


def plan_signals(job: Job, data: Stage, student: Stage | None) -> StagePlan:
    """Plan scoring every training window once with the teacher; students then read its signals.

    student: the student whose LM head the signals are for, if they are for a single head.
    """
    section = job.recipe.signals
    assert section is not None
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    temperature = recorded_temperature(encoding, objective.needs)
    if section.top_tokens and temperature != 1.0:
        raise SignalError(
            f"a server scores at temperature 1, but a term has {temperature:g}",
            where="objective.terms",
            fix="use temperature 1, or signals.encoding.kind: hidden",
        )
    student_head = None
    if isinstance(encoding, FrozenHead):
        assert student is not None
        student_head = load_head(job.model(student), dtype=torch.float32)
    identity = signal_identity(job, student_head)
    roots, kind = run_roots(job, job.teacher), "roots" if job.folded else "tokens"
    events = job.vocabulary if roots is None else roots.events
    # Record held-out text, too, for measurements during training.
    with_heldout = job.recipe.train.evaluate_every is not None

    def settings(encoding: Encoding, source: str) -> Settings:
        code = code_sha256(stillhouse.signals, stillhouse.teachers)
        provenance = {"asked": source, "data": data.digest, "code": code}
        seed = job.recipe.seed
        return Settings(encoding, events, identity, temperature, seed, provenance)

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        texts = [windows, heldout] if with_heldout else [windows]
        with _recorded_teacher(job, encoding) as teacher:
            chosen = within_vocabulary(encoding, events) if job.folded else encoding
            if not section.top_tokens:
                chosen = chosen_encoding(
                    section, encoding, teacher, windows, temperature=temperature, out=out / STORE
                )
            manifest = record(
                teacher,
                texts,
                settings(chosen, teacher.described),
                out / STORE,
                student_head=student_head,
                alone=section.vllm is not None,
            )
            flops = teacher.flops(sum(each.supervised_tokens for each in texts))
        quality = manifest.quality
        kept = f": {quality.entries:.1f} {kind} of {events:,}" if quality.entries else ""
        if leads():
            note(f"{quality.bytes:,.1f} bytes/token{kept}")
        tokens = sum(each.supervised_tokens for each in texts)
        return Outcome(
            tokens=tokens,
            flops=flops,
            peak_memory_bytes=peak_memory_bytes(),
            summary={**asdict(quality), "store_bytes": manifest.bytes},
        )

    inputs = {
        "recipe": section.model_dump(mode="json"),
        "temperature": temperature,
        "vocabulary": events,
        "precision": job.recipe.train.precision,
        "seed": job.recipe.seed,
        "data": data.digest,
        "heldout": with_heldout,
        **identity,
    }
    together = section.vllm is None  # vLLM uses all GPUs by itself
    return StagePlan(
        "signals", inputs, work, version=2, resumable=True, together=together,
        compared_when_read=(SHARD_FILES,),
    )  # fmt: skip


def records_signals(job: Job) -> bool:
    """Whether the run builds a signal store rather than reading an existing one or none."""
    section = full_job(job).recipe.signals
    return section is not None and section.store is None


@contextmanager
def _recorded_teacher(job: Job, encoding: Encoding) -> Iterator[Teacher]:
    section = job.recipe.signals
    if section is not None and (section.server is not None or section.vllm is not None):
        with engine_teacher(job, encoding) as found:
            yield _scoring_students_tokens(job, found)
        return
    teacher = _loader(job, job.teacher)()
    teacher.described = f"{job.teacher.described} in {job.precision.dtype}"
    if not isinstance(teacher, ShardedTeacher):
        teacher.model.to(default_device())
    yield _scoring_students_tokens(job, teacher)


def _scoring_students_tokens(job: Job, teacher: Teacher) -> Teacher:
    if not job.folded:
        return teacher
    return teacher.aligned(load_tokenizer(job.tokenizer), run_roots(job, job.teacher))


def signal_identity(job: Job, student_head: LMHead | None) -> dict[str, str]:
    """Return what a store must have been recorded with to be usable by this run. The data is not
    part of it: rows are found by their content, so a store with more text, or with only some of it,
    also works.

    student_head: the LM head, for a store that is only for this head.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    teacher, section = job.teacher.fingerprint, job.recipe.signals
    if section is not None and section.answers is not None:
        assert job.recipe.synthesize is not None
        api = job.recipe.synthesize.teacher.api
        assert api is not None
        teacher = api_described(api)
    identity = {"teacher": teacher, **tokenizer_identity(tokenizer)}
    roots = run_roots(job, job.teacher)
    if roots is not None and (section is None or section.answers is None):
        identity |= folded_identity(load_tokenizer(job.teacher), roots)
    return identity if student_head is None else {**identity, "head": head_sha256(student_head)}


def stored_signals(job: Job, recorded: Stage | None) -> StoredSignals | None:
    """Return the store that training reads: the run's own, or the one that the recipe names."""
    section = job.recipe.signals
    if section is None:
        return None
    if recorded is not None:
        # The stage's key, not its digest: after a resume, the same rows can be in other shards.
        return StoredSignals(recorded.path / STORE, recorded.path.name)
    assert section.store is not None
    path = job.base / section.store
    return StoredSignals(path, read_manifest(path).digest())


def training_teacher(job: Job, stored: StoredSignals | None, student: Student) -> Teacher | None:
    """Return the teacher that the student learns from: the job's teachers, or the store and, if the
    recipe allows it, the first teacher for missing rows."""
    if stored is None:
        tokenizer = load_tokenizer(job.tokenizer)
        return combined(
            [_loader(job, one)().aligned(tokenizer, run_roots(job, one)) for one in job.teachers]
        )
    store = _open(job, stored, student)
    encoding, config, head = store.settings.encoding, None, None
    if isinstance(encoding, Hidden):
        config = load_config(job.teachers[0])
        if config.get_text_config().num_hidden_layers in encoding.layers:
            head = load_head(job.teachers[0], dtype=job.precision.dtype)
    section = job.recipe.signals
    assert section is not None
    # This run's store contains all rows of the data, but nothing that the student will generate.
    own = job.recipe.train.on_policy is not None and section.store is None
    live = own or section.missing == "live"
    load: Callable[[], Teacher] = _loader(job, job.teachers[0])
    if section.server is not None:  # the server scores what its store lacks
        load = partial(server_teacher, job, encoding)
    missing = (lambda: _scoring_students_tokens(job, load())) if live else None
    return StoredTeacher(store, config=config, head=head, load_missing=missing)


def _loader(job: Job, source: ModelSource) -> Callable[[], LocalTeacher]:
    whole = partial(load_teacher, source, dtype=job.precision.dtype)
    return sharded_loader(job, source) or whole


def sharded_loader(job: Job, source: ModelSource) -> Callable[[], ShardedTeacher] | None:
    """Return a function that loads the teacher sharded; None if the recipe does not shard it."""
    train = job.recipe.train
    over = shards(train, "teacher")
    if over == 1:
        return None
    dtype, offload = job.precision.dtype, train.offload_teacher
    return partial(load_sharded_teacher, source, dtype=dtype, shards=over, offload=offload)


def _open(job: Job, stored: StoredSignals, student: Student) -> Store:
    """Open a store. Raises SignalError if it is for a different teacher, tokenizer, template,
    temperature, or LM head."""
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    head = lm_head(student.model) if isinstance(encoding, FrozenHead) else None
    identity = signal_identity(job, head)
    # A store has its own roots: different text may have merged different roots, or none.
    events = job.vocabulary if identity.pop(ROOTS, None) is None else None
    temperature = recorded_temperature(encoding, objective.needs)
    return open_store(stored.path, identity, temperature=temperature, vocabulary=events)

"""The stage that asks the teacher about every window, and where training finds the answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import stillhouse.signals
import stillhouse.teachers
from stillhouse import account
from stillhouse.data.windows import Windows
from stillhouse.errors import SignalError
from stillhouse.generation.request import api_described
from stillhouse.hardware import choose_precision, default_device, peak_memory_bytes
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import (
    Job,
    configs,
    planned_objective,
    planned_size,
    signals_encoding,
)
from stillhouse.pipeline.stage_plan import StagePlan
from stillhouse.progress import note
from stillhouse.runfolder import Outcome, Stage
from stillhouse.signals import LMHead
from stillhouse.signals.encodings import Encoding, FrozenHead, Hidden
from stillhouse.signals.manifest import Settings, read_manifest
from stillhouse.signals.store import Store, open_store
from stillhouse.teachers.hashing import code_sha256
from stillhouse.teachers.load import load_model, load_tokenizer
from stillhouse.teachers.record_store import chosen_encoding, lacking_tokens, local_teacher, score
from stillhouse.teachers.shared_vocabulary import tokenizer_identity
from stillhouse.teachers.stored_head import head_sha256, load_head
from stillhouse.training.objective import stored_temperature
from stillhouse.training.train import MODEL

STORE = "store"


@dataclass(frozen=True)
class StoredSignals:
    """A finished store. key: names what it holds."""

    path: Path
    key: str


def plan_signals(job: Job, data: Stage, student: Stage | None) -> StagePlan:
    """The teacher is asked about every training window, once; students then read its answers.

    student: whose head its answers are for, where they are for one (`for_one_head`).
    """
    section = job.recipe.signals
    assert section is not None
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    temperature = stored_temperature(objective, encoding)
    if section.server is not None and temperature != 1.0:
        raise SignalError(
            f"a server answers at temperature 1, and a term asks for {temperature:g}",
            where="objective.terms",
            fix="use temperature 1, or ask a local teacher (no signals.server)",
        )
    student_head = None
    if isinstance(encoding, FrozenHead):
        assert student is not None
        student_head = _head(job, student)
    identity = signal_identity(job, student_head)
    # Measurements on the way then know the teacher too.
    with_heldout = job.recipe.train.evaluate_every is not None

    def settings(encoding: Encoding, source: str) -> Settings:
        code = code_sha256(stillhouse.signals, stillhouse.teachers)
        provenance = {"asked": source, "data": data.digest, "code": code}
        seed = job.recipe.seed
        return Settings(encoding, job.vocabulary, identity, temperature, seed, provenance)

    def work(out: Path) -> Outcome:
        windows, heldout = open_data(data)
        asked = [windows, heldout] if with_heldout else [windows]
        if section.server is not None:
            from stillhouse.teachers.scoring_server import (
                ASKED_TOGETHER,
                server_name,
                server_teacher,
            )

            wanted = settings(encoding, server_name(section.server))
            ask = server_teacher(section.server, wanted)
            size, together = planned_size(configs(job)[1]), ASKED_TOGETHER
        else:
            device = default_device()
            dtype = choose_precision(job.recipe.train.precision, device).dtype
            code = job.trust_remote_code
            teacher = load_model(job.teacher.path, dtype=dtype, trust_remote_code=code).to(device)
            chosen = chosen_encoding(
                section,
                encoding,
                teacher,
                windows,
                vocabulary=job.vocabulary,
                temperature=temperature,
                out=out / STORE,
            )
            wanted = settings(chosen, f"{job.teacher.described} in {dtype}")
            ask = local_teacher(teacher, wanted, student_head)
            size, together = account.count_parameters(teacher), None
        manifest = score(ask, asked, wanted, out / STORE, together=together)
        quality = manifest.quality
        kept = f": {quality.entries:.1f} tokens of {job.vocabulary:,}" if quality.entries else ""
        note(f"{quality.bytes:,.1f} bytes a token{kept}")
        tokens = sum(each.supervised_tokens for each in asked)
        return Outcome(
            tokens=tokens,
            flops=account.forward_flops(size.head_once, tokens),
            peak_memory_bytes=peak_memory_bytes(),
            summary={**asdict(quality), "store_bytes": manifest.bytes},
        )

    inputs = {
        "recipe": section.model_dump(mode="json"),
        "temperature": temperature,
        "vocabulary": job.vocabulary,
        "precision": job.recipe.train.precision,
        "seed": job.recipe.seed,
        "data": data.digest,
        "heldout": with_heldout,
        **identity,
    }
    return StagePlan("signals", inputs, work, version=2, resumable=True)


def records_signals(job: Job) -> bool:
    """Whether the run makes a store, rather than reading one or none."""
    return job.recipe.signals is not None and job.recipe.signals.store is None


def for_one_head(job: Job) -> bool:
    """Whether signals are made for one student's head, which must then be there before them."""
    return isinstance(signals_encoding(job, planned_objective(job)), FrozenHead)


def signal_identity(job: Job, student_head: LMHead | None) -> dict[str, str]:
    """What a store must have been recorded with to be this run's. Not the data: rows are found by
    what they are, so that a store of more text, or of some of it, is as good.

    student_head: of a store that is for this head alone.
    """
    tokenizer = load_tokenizer(job.tokenizer_path, trust_remote_code=job.trust_remote_code)
    teacher, section = job.teacher.fingerprint, job.recipe.signals
    if section is not None and section.answers is not None:
        assert job.recipe.synthesize is not None
        api = job.recipe.synthesize.teacher.api
        assert api is not None
        teacher = api_described(api)
    identity = {"teacher": teacher, **tokenizer_identity(tokenizer)}
    return identity if student_head is None else {**identity, "head": head_sha256(student_head)}


def _head(job: Job, student: Stage) -> LMHead:
    code = job.trust_remote_code
    return load_head(student.path / MODEL, dtype=torch.float32, trust_remote_code=code)


def stored_signals(job: Job, recorded: Stage | None) -> StoredSignals | None:
    """The store that training reads: the run's own, or the one that the recipe names."""
    section = job.recipe.signals
    if section is None:
        return None
    if recorded is not None:
        # The stage's key, not its digest: after a resume, other shards hold the same rows.
        return StoredSignals(recorded.path / STORE, recorded.path.name)
    assert section.store is not None
    path = job.base / section.store
    return StoredSignals(path, read_manifest(path).digest())


@dataclass(frozen=True)
class _Asked:
    """teacher: loaded beside the student, or None. share: of the tokens it is asked about.

    stored_teacher: the store's, where its hidden states are stored.
    """

    teacher: Path | None
    store: Store | None
    share: float
    stored_teacher: Path | None = None


def whom_to_ask(
    job: Job,
    teacher: Path | None,
    stored: StoredSignals | None,
    windows: Windows,
    student: Stage,
) -> _Asked:
    """A live teacher, a store, or both where the store lacks some of the windows."""
    if stored is None:
        return _Asked(teacher, None, 1.0)
    store = _open(job, stored, student)
    lacking = _lacking(job, store, windows)
    hidden = isinstance(store.settings.encoding, Hidden)
    return _Asked(
        teacher if lacking else None,
        store,
        lacking / windows.supervised_tokens,
        teacher if hidden else None,
    )


def _open(job: Job, stored: StoredSignals, student: Stage) -> Store:
    """Raises SignalError: the store is of another teacher, tokenizer, template, temperature or
    head."""
    objective = planned_objective(job)
    encoding = signals_encoding(job, objective)
    head = _head(job, student) if isinstance(encoding, FrozenHead) else None
    return open_store(
        stored.path,
        signal_identity(job, head),
        temperature=stored_temperature(objective, encoding),
        vocabulary=job.vocabulary,
    )


def _lacking(job: Job, store: Store, windows: Windows) -> int:
    """Training tokens that are to be asked about live. Raises SignalError where they may not."""
    lacking = lacking_tokens(store, windows)
    if lacking:
        told = f"the store lacks {lacking:,} of {windows.supervised_tokens:,} training tokens"
        section = job.recipe.signals
        if section is None or section.missing == "error":
            raise SignalError(
                told,
                where=store.path,
                fix="set signals.missing: live to ask the teacher about them, or record a store "
                "of this data",
            )
        note(f"{told}: the teacher is asked about them live")
    return lacking

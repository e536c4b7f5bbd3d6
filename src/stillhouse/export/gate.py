"""The replay gate: load an export as a user would, and compare it with its source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data.draw_windows import draw_windows
from stillhouse.data.windows import ARRAYS, WindowSet
from stillhouse.errors import ModelError
from stillhouse.export import replay
from stillhouse.export.fresh_process import run_script
from stillhouse.hardware import default_device, free_memory
from stillhouse.progress import note
from stillhouse.scratch import temporary_folder
from stillhouse.teachers.load_model import load_model
from stillhouse.teachers.model_source import AnyModel, source_of

REPLAY_TOKENS = 1024
REPLAY_PROMPTS = 3
REPLAY_NEW_TOKENS = 24
LLAMA_CPP_KL = 0.02
"""Maximum KL in nats/token between a file in float32 and in llama.cpp, which rounds the inputs of
products to int8 and has a float16 KV cache."""
NEAR_EXACT = 0.001
"""Maximum KL in nats/token for exports that have the source's numbers, exactly or nearly."""
MOVED = ((NEAR_EXACT, 0.02), (0.02, 0.05), (0.3, 0.2), (1.0, 0.5))
"""(KL limit, fraction) pairs: up to this limit, an export can have a different top-1 token at this
fraction of the positions where the source is sure. If the best two tokens are one nat apart and
hold nearly all of the probability, a different top-1 token costs 0.11 nats, so a mean of 0.001
allows at most 1%. An export at its limit changes the difference between two logits by about
√(2 KL) nats: 0.2, 0.8, and 1.4 for the other three limits. If every lead were exactly one nat,
0.00003%, 10%, and 24% of the top-1 tokens would flip."""
MOVED_OF = 100
"""With fewer positions where the source is sure, the fraction is not meaningful."""


@dataclass(frozen=True)
class Likeness:
    """How close two models are on the same tokens: KL in nats/token, and the fraction of positions
    with the same top-1 token."""

    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class ReplayText:
    """Both models' greedy continuations of a prompt."""

    prompt: str
    source: str
    exported: str


@dataclass(frozen=True)
class ReplayResult:
    """How an exported model compares with its float32 source on held-out text.

    format: the format's name in the recipe.
    kl: mean KL(source ‖ exported) in nats/token.
    kl_limit: the maximum allowed.
    top1_agreement: fraction of positions with the same top-1 token.
    tokens: number of positions compared.
    bytes: size of the weight files.
    notes: for the user.
    teacher, source_teacher: teacher ‖ exported and teacher ‖ source, on the same tokens.
    decode_tokens_per_s: decoding speed in the format's own runtime; None if that is not installed.
    source_decode_tokens_per_s: decoding speed of the float32 source in transformers.
    llama_cpp: source ‖ the file in llama.cpp; None if llama.cpp is not installed or does not read
        the format.
    """

    format: str
    dtype: str
    kl: float
    kl_limit: float
    top1_agreement: float
    tokens: int
    bytes: int
    texts: list[ReplayText]
    notes: list[str]
    teacher: Likeness | None = None
    source_teacher: Likeness | None = None
    decode_tokens_per_s: float | None = None
    source_decode_tokens_per_s: float | None = None
    llama_cpp: Likeness | None = None


@dataclass(frozen=True)
class Readers:
    """What reads an export in its replay, and what must match.

    same_tokens: the export's tokenizer must tokenize the prompts like the source's.
    llama_cpp: llama.cpp reads the file.
    transformers: transformers reads the file.
    plain_prompts: llama.cpp must tokenize the prompts alike without the chat template, too.
    float32: transformers multiplies in float32, whatever dtype the numbers are stored in.
    rounds_to: the export must also match the source with its weights rounded to this dtype
        ("bfloat16").
    """

    same_tokens: bool = True
    llama_cpp: bool = False
    transformers: bool = True
    plain_prompts: bool = True
    float32: bool = False
    rounds_to: str = ""

    def __str__(self) -> str:
        if not self.llama_cpp:
            return ""
        return ", in transformers and in llama.cpp" if self.transformers else ", in llama.cpp"


READERS = Readers()


@dataclass(frozen=True)
class Gate:
    """The text, prompts, and limits for comparing exports with one source.

    windows: held-out text, from which windows are drawn.
    prompts: continued greedily, through the chat template.
    seed: for drawing the windows.
    kl_limit: maximum KL in nats/token; None: each format's default.
    teacher_logits: a file with the teacher's logits on the same text (see `against_teacher`).
    """

    source: AnyModel
    windows: WindowSet
    prompts: list[str]
    seed: int
    kl_limit: float | None = None
    teacher_logits: Path | None = None

    @property
    def folder(self) -> Path:
        """The source's folder."""
        return source_of(self.source).path

    def replay(self, exported: Path, readers: Readers = READERS) -> dict[str, Any]:
        """Run `replay.py`, which imports nothing from Stillhouse, and return its answer.

        exported: a folder, or a GGUF file.
        """
        request = {
            "source": str(self.folder.resolve()),
            "exported": str(exported.resolve()),
            "prompts": self.prompts[:REPLAY_PROMPTS],
            "max_new_tokens": REPLAY_NEW_TOKENS,
            "trust_remote_code": source_of(self.source).trusted,
            **asdict(readers),
            "teacher_logits": self.teacher_logits and str(self.teacher_logits),
        }
        return run_script(
            "replay.py",
            request,
            windows=drawn_windows(self),
            offline=True,
            what="the exported checkpoint cannot be loaded and run again",
            where=self.folder,
            fix="check that transformers can load this model without Stillhouse, and that two "
            "copies of it fit into memory",
        )

    def pass_or_raise(
        self,
        exported: Path,
        *,
        format: str,
        dtype: str,
        limit: float,
        advice: str,
        readers: Readers = READERS,
        notes: Sequence[str] = (),
    ) -> ReplayResult:
        """Replay an export: a folder with safetensors, or a GGUF file.

        limit: the format's default. If the rounding itself can be repeated (`readers.rounds_to`),
            exceeding the default only leads to a note.
        advice: what to do if rounding costs more.

        Raises ModelError if the export does not load, does not match the model, or differs by more
        than is allowed.
        """
        limit = limit if self.kl_limit is None else self.kl_limit
        if not readers.transformers:
            limit += LLAMA_CPP_KL
        note(f"Replaying the {format} export ({dtype}) in a fresh process{readers}")
        found = self.replay(exported, readers)
        most = math.inf if readers.rounds_to and self.kl_limit is None else limit
        check_replay(found, most, max(LLAMA_CPP_KL, self.kl_limit or 0.0), self.folder, advice)
        pairs = {
            name: Likeness(pair["kl"], pair["top1_agreement"])
            for name, pair in found["pairs"].items()
        }
        own, speed = pairs["source ‖ exported"], found["decode_tokens_per_s"]
        files = [exported] if exported.is_file() else exported.glob("*.safetensors")
        if own.kl > limit:
            notes = [
                *notes,
                f"Rounding costs {own.kl:.2g} nats/token, which is more than usual: {advice}.",
            ]
        return ReplayResult(
            format=format,
            dtype=dtype,
            kl=own.kl,
            kl_limit=limit,
            top1_agreement=own.top1_agreement,
            tokens=found["tokens"],
            bytes=sum(file.stat().st_size for file in files),
            texts=[ReplayText(t["prompt"], t["source"], t["exported"]) for t in found["texts"]],
            notes=list(notes),
            teacher=pairs.get("teacher ‖ exported"),
            source_teacher=pairs.get("teacher ‖ source"),
            decode_tokens_per_s=speed.get("exported"),
            source_decode_tokens_per_s=speed["source"],
            llama_cpp=pairs.get("source ‖ llama.cpp") if readers.transformers else own,
        )


@contextmanager
def against_teacher(
    gate: Gate, teacher: AnyModel, *, vocabulary: int, dtype: torch.dtype
) -> Iterator[Gate]:
    """Yield a gate whose replays also compare every export with the teacher.

    Within the context, the teacher's logits for the first `vocabulary` tokens are in a file; they
    are computed once, in `dtype`.
    """
    with temporary_folder("stillhouse-teacher-") as name:
        file = Path(name) / "logits.safetensors"
        model = load_model(teacher, dtype=dtype).to(default_device())
        logits = {}
        for place, window in replay.by_place(drawn_windows(gate)).items():
            found_NV = replay.logits_of(model, place, window, replay.rows_of(window["labels"]))
            logits[place] = found_NV[:, :vocabulary].cpu().contiguous()
        del model
        free_memory()  # Models have reference cycles.
        save_file(logits, file)
        del logits
        yield replace(gate, teacher_logits=file)


def drawn_windows(gate: Gate) -> dict[str, Tensor]:
    """Windows in which the replay compares REPLAY_TOKENS tokens or more, as tensors named
    PLACE.ARRAY; all windows if there are fewer tokens."""
    drawn, _ = draw_windows(gate.windows, REPLAY_TOKENS, gate.seed, most=replay.ROWS)
    tensors = {
        f"{place}.{key}": window[key].clone()
        for place, window in enumerate(drawn)
        for key in ARRAYS
    }
    if not tensors:
        raise ModelError(
            "there are no held-out tokens to compare the export with its source on",
            fix="hold out some text with data.heldout_tokens or data.heldout_sources",
        )
    return tensors


def check_replay(
    found: dict[str, Any], limit: float, runtime_limit: float, source: Path, advice: str
) -> None:
    """Raise ModelError if the replay's answer does not match the source.

    If the rounded source was compared, it must nearly equal the export.

    limit: maximum KL in nats/token between source and export.
    runtime_limit: maximum KL between the export and the same file in llama.cpp.
    """
    report = "report this as a bug in the export, with the model's config.json"
    if found["problems"]:
        raise ModelError(
            f"the exported checkpoint does not match the model: {'; '.join(found['problems'])}",
            where=source,
            fix=report,
        )
    what = "the exported checkpoint differs from its source"
    _check_pair(found, "source ‖ exported", limit, what, source, advice)
    what += ", rounded to the same numbers,"
    _check_pair(found, "rounded source ‖ exported", NEAR_EXACT, what, source, report)
    what = "the exported file in llama.cpp differs from the same file in transformers"
    fix = "update llama-cpp-python, or raise export.kl_limit"
    _check_pair(found, "exported ‖ llama.cpp", runtime_limit, what, source, fix)
    if limit > NEAR_EXACT:
        return
    for text in found["texts"]:
        # Compare only while the source is sure, since the text after a near tie is arbitrary.
        if not text["exported"].lstrip().startswith(text["sure"].lstrip()):
            raise ModelError(
                f"the exported checkpoint answers {text['prompt'][:40]!r} with "
                f"{text['exported'][:40]!r}, but its source with {text['sure'][:40]!r}",
                where=source,
                fix=report,
            )


def _check_pair(
    found: dict[str, Any], name: str, limit: float, what: str, source: Path, fix: str
) -> None:
    pair = found["pairs"].get(name)
    if pair is None:
        return
    if not pair["kl"] <= limit:  # NaN also fails.
        raise ModelError(
            f"{what} by {pair['kl']:.3g} nats/token on {found['tokens']} held-out tokens; at most "
            f"{limit:g} is allowed",
            where=source,
            fix=fix,
        )
    share = next((share for most, share in MOVED if limit <= most), 1.0)
    if pair["sure"] >= MOVED_OF and pair["moved"] > share * pair["sure"]:
        raise ModelError(
            f"{what} in the top-1 token at {pair['moved']} of the {pair['sure']} held-out "
            f"positions with a clear top-1 token; at most {share:.0%} is allowed",
            where=source,
            fix=fix,
        )

"""The replay gate: an export is loaded as a stranger would load it, and compared to its source."""

from __future__ import annotations

import gc
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data import IGNORED, WindowSet
from stillhouse.errors import ModelError, RunError
from stillhouse.export import replay
from stillhouse.export.script import offline, run_script
from stillhouse.hardware import default_device
from stillhouse.progress import note
from stillhouse.runfolder import disk_errors
from stillhouse.teachers import load_model

REPLAY_TOKENS = 1024
REPLAY_PROMPTS = 3
REPLAY_NEW_TOKENS = 24
LLAMA_CPP_KL = 0.02
"""Nats a token more in llama.cpp, whose products round their inputs to int8 and whose cache is
float16, than of the same numbers in float32."""


@dataclass(frozen=True)
class Likeness:
    """How near one model is to another on the same tokens: nats a token, and equal top-1 tokens."""

    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class ReplayText:
    """What both models write greedily after one prompt."""

    prompt: str
    source: str
    exported: str


@dataclass(frozen=True)
class ReplayResult:
    """How an exported model compares with its float32 source on held-out text.

    format: as the recipe names it. kl: mean KL(source ‖ exported), nats a token; kl_limit: the most
    that was allowed. top1_agreement: share of positions with the same likeliest token. tokens:
    positions compared. bytes: of the weights' files. notes: what the user should know of it.
    teacher, source_teacher: KL(teacher ‖ exported) and KL(teacher ‖ source) on the same tokens.
    decode_tokens_per_s: in the format's own runtime, None where that is not installed, beside the
    float32 source's in transformers. llama_cpp: what llama.cpp made of the file, None where it is
    not installed or does not read the format.
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
class Gate:
    """What exports of one source are compared on.

    windows: held-out text, drawn by `seed`. prompts: answered greedily through the chat template.
    kl_limit: nats a token allowed; None: each format's own. teacher_logits: a file of the teacher's
    answers to the same text (`against_teacher`).
    """

    source: Path
    windows: WindowSet
    prompts: list[str]
    seed: int
    kl_limit: float | None = None
    trust_remote_code: bool = False
    teacher_logits: Path | None = None

    def replay(
        self,
        exported: Path,
        *,
        same_tokens: bool = True,
        llama_cpp: bool = False,
        transformers: bool = True,
    ) -> dict[str, Any]:
        """Runs `replay.py` by its path, so that it imports nothing of Stillhouse; its answer.

        exported: a folder, or a GGUF file. same_tokens: its tokenizer must cut the prompts alike.
        llama_cpp: llama.cpp reads the file too; alone, where transformers cannot.
        """
        with tempfile.TemporaryDirectory(prefix="stillhouse-replay-") as name:
            folder = Path(name)
            save_file(drawn_windows(self), folder / "windows.safetensors")
            request = {
                "source": str(self.source.resolve()),
                "exported": str(exported.resolve()),
                "prompts": self.prompts[:REPLAY_PROMPTS],
                "max_new_tokens": REPLAY_NEW_TOKENS,
                "trust_remote_code": self.trust_remote_code,
                "same_tokens": same_tokens,
                "llama_cpp": llama_cpp,
                "transformers": transformers,
                "teacher_logits": self.teacher_logits and str(self.teacher_logits),
            }
            run_script(
                "replay.py",
                folder,
                request,
                env=offline(),
                what="the exported checkpoint cannot be loaded and run again",
                where=self.source,
                fix="see that transformers alone can load this model, and that memory suffices "
                "for it twice",
            )
            answer: dict[str, Any] = json.loads((folder / "answer.json").read_text("utf-8"))
            return answer

    def pass_or_raise(
        self,
        exported: Path,
        files: list[Path],
        *,
        format: str,
        dtype: str,
        limit: float,
        advice: str,
        same_tokens: bool = True,
        llama_cpp: bool = False,
        transformers: bool = True,
        notes: list[str] | None = None,
    ) -> ReplayResult:
        """Replays an export whose weights are in `files`.

        limit: the format's own. advice: what helps where the rounding costs more than that.
        llama_cpp: it must be the model in llama.cpp too; alone, where transformers cannot read it.
        Raises ModelError: it does not load, is not the model, or differs by more than is allowed.
        """
        limit = limit if self.kl_limit is None else self.kl_limit
        also = ""
        if llama_cpp:
            also = ", in transformers and in llama.cpp" if transformers else ", in llama.cpp"
        if not transformers:
            limit += LLAMA_CPP_KL
        note(f"Replaying the {format} export ({dtype}) in a fresh process{also}")
        found = self.replay(
            exported, same_tokens=same_tokens, llama_cpp=llama_cpp, transformers=transformers
        )
        pairs = {name: Likeness(**pair) for name, pair in found.get("pairs", {}).items()}
        _check(found, pairs, limit, self.source, advice)
        own, speed = pairs["source ‖ exported"], found["decode_tokens_per_s"]
        return ReplayResult(
            format=format,
            dtype=dtype,
            kl=own.kl,
            kl_limit=limit,
            top1_agreement=own.top1_agreement,
            tokens=found["tokens"],
            bytes=sum(file.stat().st_size for file in files),
            texts=[ReplayText(**text) for text in found["texts"]],
            notes=notes or [],
            teacher=pairs.get("teacher ‖ exported"),
            source_teacher=pairs.get("teacher ‖ source"),
            decode_tokens_per_s=speed.get("exported"),
            source_decode_tokens_per_s=speed["source"],
            llama_cpp=pairs.get("source ‖ llama.cpp") if transformers else own,
        )


@contextmanager
def against_teacher(
    gate: Gate, teacher: Path, *, vocabulary: int, dtype: torch.dtype
) -> Iterator[Gate]:
    """The gate, whose replays also tell how near every export is to the teacher.

    The teacher answers once, in `dtype`; its logits of the first `vocabulary` tokens are kept in a
    file while the block lasts.
    """
    code = gate.trust_remote_code
    with tempfile.TemporaryDirectory(prefix="stillhouse-teacher-") as name:
        file = Path(name) / "logits.safetensors"
        model = load_model(teacher, dtype=dtype, trust_remote_code=code).to(default_device())
        windows: dict[str, dict[str, Tensor]] = {}
        for key, tensor in drawn_windows(gate).items():
            place, part = key.split(".")
            windows.setdefault(place, {})[part] = tensor
        logits = {}
        for place, window in windows.items():
            found_NV = replay.logits_of(model, place, window, replay.rows_of(window["labels"]))
            logits[place] = found_NV[:, :vocabulary].cpu().contiguous()
        del model
        gc.collect()  # a model refers to itself
        save_file(logits, file)
        del logits
        yield replace(gate, teacher_logits=file)


def fill(out: Path, work: Callable[[Path], ReplayResult]) -> ReplayResult:
    """Does `work` in a temporary folder that gets the name `out` once it is whole and has passed.

    Raises RunError: no space, no permission, `out` has files already.
    """
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        _check_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            result = work(partial)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return result


def _check_free(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(
            "the export's folder has files already",
            where=out,
            fix="give another folder, or remove this one first",
        )


def drawn_windows(gate: Gate) -> dict[str, Tensor]:
    """Windows in an order drawn by the gate's seed, until enough of their tokens are supervised."""
    windows, seed = gate.windows, gate.seed
    order = random.Random(seed).sample(range(len(windows)), len(windows))
    tensors: dict[str, Tensor] = {}
    tokens = 0
    for place, index in enumerate(order):
        window = windows[index]
        supervised = int((window["labels"][1:] != IGNORED).sum())
        if not supervised:
            continue
        for key in ("input_ids", "labels", "position_ids"):
            tensors[f"{place}.{key}"] = window[key].clone()
        tokens += supervised
        if tokens >= REPLAY_TOKENS:
            break
    if not tensors:
        raise ModelError(
            "there is no held-out token on which the export could be compared with its source",
            fix="hold out some text: data.heldout_tokens, or data.heldout_sources",
        )
    return tensors


def _check(
    found: dict[str, Any], pairs: dict[str, Likeness], limit: float, source: Path, advice: str
) -> None:
    if found["problems"]:
        raise ModelError(
            f"the exported checkpoint is not the model: {'; '.join(found['problems'])}",
            where=source,
            fix="this is a fault of the export: report it with the model's config.json",
        )
    limits = {"exported": limit, "llama.cpp": limit + LLAMA_CPP_KL}
    for name, allowed in limits.items():
        pair = pairs.get(f"source ‖ {name}")
        if pair is not None and not pair.kl <= allowed:  # NaN fails too
            there = " in llama.cpp" if name == "llama.cpp" else ""
            raise ModelError(
                f"the exported checkpoint differs from its source{there} by {pair.kl:.3g} nats a "
                f"token on {found['tokens']} held-out tokens; at most {allowed:g} is allowed",
                where=source,
                fix=advice,
            )

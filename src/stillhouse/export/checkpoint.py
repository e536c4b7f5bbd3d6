"""The checkpoint to ship: cast, saved, and replayed in a process that does not know Stillhouse."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data import IGNORED, WindowSet
from stillhouse.errors import ModelError, RunError
from stillhouse.progress import note
from stillhouse.runfolder import disk_errors
from stillhouse.teachers import load_model, load_tokenizer, save_tokenizer
from stillhouse.teachers.quiet import quiet

KL_LIMITS = {"float32": 1e-6, "bfloat16": 0.01}
"""Nats a token between the checkpoint and its export. float32 is the same weights again. Rounding
SmolLM2-135M's weights and products to bfloat16 costs 0.0009 on English prose; a layer or a head
that is not the source's costs whole nats."""

REPLAY_TOKENS = 1024
REPLAY_PROMPTS = 3
REPLAY_NEW_TOKENS = 24


@dataclass(frozen=True)
class ReplayText:
    """What both models write greedily after one prompt."""

    prompt: str
    source: str
    exported: str


@dataclass(frozen=True)
class ReplayResult:
    """How the exported checkpoint compares with its float32 source on held-out text.

    kl: mean KL(source ‖ exported), nats a token; kl_limit: the most that was allowed.
    top1_agreement: share of positions with the same likeliest token. tokens: positions compared.
    bytes: of the safetensors files.
    """

    dtype: str
    kl: float
    kl_limit: float
    top1_agreement: float
    tokens: int
    bytes: int
    texts: list[ReplayText]


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: Literal["bfloat16", "float32"],
    windows: WindowSet,
    prompts: list[str],
    seed: int,
    kl_limit: float | None = None,
    trust_remote_code: bool = False,
) -> ReplayResult:
    """Casts the checkpoint in `source` to `dtype` and writes a plain Hugging Face folder `out`.

    The folder holds safetensors, config, generation config, tokenizer and chat template: all that
    `AutoModelForCausalLM` and `AutoTokenizer` need, and nothing else. Before it gets its name it
    is loaded in a fresh process by transformers alone, must have exactly the model's weights, and
    is compared with `source` on `windows` (drawn by `seed`) and, greedily, on `prompts`.
    Raises ModelError: a damaged source, an export that does not load or that differs from the
    source by more than `kl_limit` (default: `KL_LIMITS`). RunError: no space, no permission, `out`
    has files already.
    """
    limit = KL_LIMITS[dtype] if kl_limit is None else kl_limit
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        _check_free(out)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _save(source, partial, getattr(torch, dtype), trust_remote_code)
            note(f"Replaying the {dtype} export in a fresh process")
            found = _replay(source, partial, windows, prompts, seed, trust_remote_code)
            _check(found, limit, source)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return ReplayResult(
        dtype=dtype,
        kl=found["kl"],
        kl_limit=limit,
        top1_agreement=found["top1_agreement"],
        tokens=found["tokens"],
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        texts=[ReplayText(**text) for text in found["texts"]],
    )


def _check_free(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(
            "the export's folder has files already",
            where=out,
            fix="give another folder, or remove this one first",
        )


def _save(source: Path, out: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
    model = load_model(source, dtype=torch.float32, trust_remote_code=trust_remote_code).to(dtype)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    try:
        with quiet():
            model.save_pretrained(out)
    except ValueError as error:
        # transformers refuses a generation config that contradicts itself.
        raise ModelError(
            f"transformers refuses to save this model ({error})",
            where=source,
            fix="correct generation_config.json in that folder",
        ) from error
    save_tokenizer(tokenizer, out)


def _replay(
    source: Path,
    exported: Path,
    windows: WindowSet,
    prompts: list[str],
    seed: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Runs `replay.py` by its path, so that it imports nothing of Stillhouse; its answer."""
    script = Path(__file__).with_name("replay.py")
    with tempfile.TemporaryDirectory(prefix="stillhouse-replay-") as name:
        folder = Path(name)
        save_file(_draw(windows, seed), folder / "windows.safetensors")
        request = {
            "source": str(source.resolve()),
            "exported": str(exported.resolve()),
            "prompts": prompts[:REPLAY_PROMPTS],
            "max_new_tokens": REPLAY_NEW_TOKENS,
            "trust_remote_code": trust_remote_code,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: the script's own folder must not be searched for modules.
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(folder)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ModelError(
                f"the exported checkpoint cannot be loaded and run again ({last[0]})",
                where=source,
                fix="see that transformers alone can load this model, and that memory suffices "
                "for it twice",
            )
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return answer


def _draw(windows: WindowSet, seed: int) -> dict[str, Tensor]:
    """Windows in an order drawn by `seed`, until enough of their tokens are supervised."""
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


def _check(found: dict[str, Any], limit: float, source: Path) -> None:
    if found["problems"]:
        raise ModelError(
            f"the exported checkpoint is not the model: {'; '.join(found['problems'])}",
            where=source,
            fix="this is a fault of the export: report it with the model's config.json",
        )
    if not found["kl"] <= limit:  # NaN fails too
        raise ModelError(
            f"the exported checkpoint differs from its source by {found['kl']:.3g} nats a token "
            f"on {found['tokens']} held-out tokens; at most {limit:g} is allowed",
            where=source,
            fix="export float32 (export.dtype: float32): this model's weights do not survive "
            "the rounding"
            if limit > KL_LIMITS["float32"]
            else "the saved weights are not the source's: check the disk and the model's code",
        )

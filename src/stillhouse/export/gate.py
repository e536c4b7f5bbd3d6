"""The replay gate: an export is loaded as a stranger would load it, and compared to its source."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data import IGNORED, WindowSet
from stillhouse.errors import ModelError, RunError
from stillhouse.progress import note
from stillhouse.runfolder import disk_errors

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
    """How an exported model compares with its float32 source on held-out text.

    format: as the recipe names it. kl: mean KL(source ‖ exported), nats a token; kl_limit: the most
    that was allowed. top1_agreement: share of positions with the same likeliest token. tokens:
    positions compared. bytes: of the weights' files. notes: what the user should know of it.
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


@dataclass(frozen=True)
class Gate:
    """What exports of one source are compared on.

    windows: held-out text, drawn by `seed`. prompts: answered greedily through the chat template.
    kl_limit: nats a token allowed; None: each format's own.
    """

    source: Path
    windows: WindowSet
    prompts: list[str]
    seed: int
    kl_limit: float | None = None
    trust_remote_code: bool = False

    def replay(self, exported: Path, *, same_tokens: bool = True) -> dict[str, Any]:
        """Runs `replay.py` by its path, so that it imports nothing of Stillhouse; its answer.

        exported: a folder, or a GGUF file. same_tokens: its tokenizer must cut the prompts alike.
        """
        script = Path(__file__).with_name("replay.py")
        with tempfile.TemporaryDirectory(prefix="stillhouse-replay-") as name:
            folder = Path(name)
            save_file(_draw(self.windows, self.seed), folder / "windows.safetensors")
            request = {
                "source": str(self.source.resolve()),
                "exported": str(exported.resolve()),
                "prompts": self.prompts[:REPLAY_PROMPTS],
                "max_new_tokens": REPLAY_NEW_TOKENS,
                "trust_remote_code": self.trust_remote_code,
                "same_tokens": same_tokens,
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
        notes: list[str] | None = None,
    ) -> ReplayResult:
        """Replays an export whose weights are in `files`.

        limit: the format's own. advice: what helps where the rounding costs more than that.
        Raises ModelError: it does not load, is not the model, or differs by more than is allowed.
        """
        limit = limit if self.kl_limit is None else self.kl_limit
        note(f"Replaying the {format} export ({dtype}) in a fresh process")
        found = self.replay(exported, same_tokens=same_tokens)
        _check(found, limit, self.source, advice)
        return ReplayResult(
            format=format,
            dtype=dtype,
            kl=found["kl"],
            kl_limit=limit,
            top1_agreement=found["top1_agreement"],
            tokens=found["tokens"],
            bytes=sum(file.stat().st_size for file in files),
            texts=[ReplayText(**text) for text in found["texts"]],
            notes=notes or [],
        )


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


def _check(found: dict[str, Any], limit: float, source: Path, advice: str) -> None:
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
            fix=advice,
        )

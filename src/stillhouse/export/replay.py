"""The export's replay, run as a script: transformers, torch and safetensors only.

`python -P replay.py FOLDER` reads FOLDER/request.json and FOLDER/windows.safetensors, and writes
FOLDER/answer.json. It stands for a user who has never heard of Stillhouse, so it imports nothing
of it.

Shapes: L tokens of a window, N supervised rows of a window, V vocabulary.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = 512
"""The most supervised rows of one window that are compared: bounds the logits held at once."""


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    windows = _windows(folder / "windows.safetensors")
    exported = Path(request["exported"])
    options = {"local_files_only": True, "trust_remote_code": request["trust_remote_code"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source_model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype=torch.float32, **options
    ).to(device)
    source_tokenizer = AutoTokenizer.from_pretrained(request["source"], **options)
    model, info, tokenizer = _load(exported, options)
    model = model.to(device)
    prompts = request["prompts"] if request["same_tokens"] else []
    problems = _problems(model, info, exported)
    problems += _tokenizer_problems(source_tokenizer, tokenizer, prompts)
    answer: dict[str, Any] = {"problems": problems}
    if not answer["problems"]:
        answer |= _compare(source_model, model, windows)
        new = request["max_new_tokens"]
        answer["texts"] = [
            {
                "prompt": prompt,
                "source": _greedy(source_model, source_tokenizer, prompt, new),
                "exported": _greedy(model, tokenizer, prompt, new),
            }
            for prompt in request["prompts"]
        ]
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _load(exported: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """Model, loading info and tokenizer, of a folder as it is or of a GGUF file in float32."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": exported}
    dtype: Any = "auto"
    if exported.is_file():
        where = {"pretrained_model_name_or_path": exported.parent, "gguf_file": exported.name}
        dtype = torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype, output_loading_info=True, **options
    )
    return model.eval(), info, AutoTokenizer.from_pretrained(**where, **options)


def _windows(file: Path) -> list[dict[str, torch.Tensor]]:
    windows: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(file).items():
        place, key = name.split(".")
        windows.setdefault(place, {})[key] = tensor
    return [windows[place] for place in sorted(windows, key=int)]


def _problems(model: Any, info: dict[str, Any], exported: Path) -> list[str]:
    """What the export's weights lack or have too much of, in words."""
    stored: set[str] = set()
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {_parameter(name) for name in tensors.keys()}  # noqa: SIM118
    extra = {*info["unexpected_keys"], *(stored - set(model.state_dict()))}
    found = {
        "missing": {*info["missing_keys"]},
        "not part of it": extra,
        "of another shape": {str(key[0]) for key in info["mismatched_keys"]},
    }
    return [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in found.items() if names]


def _parameter(stored: str) -> str:
    """The parameter that a stored tensor is part of: torchao stores x.weight as x._weight_scale."""
    return re.sub(r"\._weight_(qdata|scale|zero_point)$", ".weight", stored)


def _tokenizer_problems(source: Any, exported: Any, prompts: list[str]) -> list[str]:
    """Tokens with other ids, and prompts that are cut otherwise."""
    theirs = exported.get_vocab()
    moved = [token for token, index in source.get_vocab().items() if theirs.get(token) != index]
    problems = [f"tokens with other ids: {', '.join(sorted(moved)[:4])}"] if moved else []
    if source.chat_template != exported.chat_template:
        problems.append("another chat template")
    for prompt in prompts:
        if source(prompt)["input_ids"] != exported(prompt)["input_ids"]:
            problems.append(f"tokenized otherwise: {prompt[:40]!r}")
    return problems


@torch.inference_mode()
def _compare(
    source: Any, exported: Any, windows: list[dict[str, torch.Tensor]]
) -> dict[str, float | int]:
    """Mean KL(source ‖ exported) in nats, and top-1 agreement, over supervised tokens."""
    kl = 0.0
    same = tokens = 0
    for window in windows:
        # The logits at t-1 predict the label at t.
        rows_N = (window["labels"][1:] != -100).nonzero().flatten()[:ROWS]
        p_NV, q_NV = _logits(source, window, rows_N), _logits(exported, window, rows_N)
        same += int((p_NV.argmax(-1) == q_NV.argmax(-1)).sum())
        tokens += len(rows_N)
        for p, q in zip(p_NV.split(64), q_NV.split(64), strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
    return {"kl": kl / tokens, "top1_agreement": same / tokens, "tokens": tokens}


def _logits(model: Any, window: dict[str, torch.Tensor], rows_N: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of those rows. Without a mask, restarting positions part the documents."""
    end = int(rows_N[-1]) + 1
    logits_1NV: torch.Tensor = model(
        input_ids=window["input_ids"][None, :end].to(model.device),
        position_ids=window["position_ids"][None, :end].to(model.device),
        logits_to_keep=rows_N.to(model.device),
        use_cache=False,
    ).logits
    return logits_1NV[0]


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(model.device)
    output_1L = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

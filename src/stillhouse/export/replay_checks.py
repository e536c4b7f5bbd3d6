"""Check that an export has its model's weights, and tokenizes like its source.

`replay.py` loads this file by its path, so it imports nothing from Stillhouse.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedTokenizerFast, core_model_loading

ROLES = ("eos", "bos", "pad")

Cut = Callable[[str], list[int]]


def weight_problems(model: Any, info: dict[str, Any], exported: Path) -> list[str]:
    """Describe missing and unexpected weights, and weights with a different shape."""
    stored: set[str] = set()
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {_parameter(name) for name in tensors.keys()}  # noqa: SIM118
    extra = {*info["unexpected_keys"], *(stored - _saved_names(model))}
    found = {
        "missing": {*info["missing_keys"]},
        "unexpected": extra,
        "of a different shape": {str(key[0]) for key in info["mismatched_keys"]},
    }
    return [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in found.items() if names]


def _saved_names(model: Any) -> set[str]:
    """The names under which transformers saves the model's tensors. Version 5 stores some of them
    under version 4's names, such as those of single experts, which it keeps in one tensor."""
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    if getattr(model, "hf_quantizer", None) is not None:
        return set(tensors)
    return {*tensors, *core_model_loading.revert_weight_conversion(model, tensors)}


def _parameter(stored: str) -> str:
    """The parameter that a stored tensor belongs to: torchao stores x.weight as several tensors,
    such as x._weight_scale."""
    return re.sub(r"\._weight_(qdata|scale|zero_point)$", ".weight", stored)


def as_stored(tokenizer: Any, folder: Path, prompts: list[str]) -> Any:
    """The tokenizer exactly as in tokenizer.json, like in a GGUF file. The class that transformers
    chooses by architecture can add tokens, or split text by different rules."""
    known = type(tokenizer).__module__.startswith("transformers.")
    if not known or not (folder / "tokenizer.json").is_file():
        return tokenizer
    stored = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    same = tokenizer.get_vocab() == stored.get_vocab() and all(
        tokenizer(prompt)["input_ids"] == stored(prompt)["input_ids"] for prompt in prompts
    )
    return tokenizer if same else stored


def tokenizer_problems(source: Any, exported: Any, prompts: list[str]) -> list[str]:
    """Describe tokens with different ids, different special tokens, and prompts that are tokenized
    differently."""
    theirs = exported.get_vocab()
    moved = [token for token, index in source.get_vocab().items() if theirs.get(token) != index]
    problems = [f"tokens with different ids: {', '.join(sorted(moved)[:4])}"] if moved else []
    if _template(source) != _template(exported):
        problems.append("a different chat template")
    problems += other_roles(source, {role: getattr(exported, f"{role}_token_id") for role in ROLES})
    read = partial(prompt_ids, exported)
    return problems + tokenized_otherwise(source, lambda t: exported(t)["input_ids"], read, prompts)


def _template(tokenizer: Any) -> str | None:
    """The chat template; if there are several, the default template."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def other_roles(source: Any, found: dict[str, int | None]) -> list[str]:
    """Describe roles whose tokens differ. Roles that the source does not set are not compared,
    because loaders have defaults for them."""
    ids = {role: getattr(source, f"{role}_token_id") for role in found}
    return [
        f"a different {role} token: {found[role]} instead of {index}"
        for role, index in ids.items()
        if index is not None and found[role] != index
    ]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's token ids, through the chat template if there is one."""
    if not _template(tokenizer):
        return list(tokenizer(prompt)["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


def tokenized_otherwise(source: Any, plain: Cut, read: Cut, prompts: list[str]) -> list[str]:
    """Describe prompts that are tokenized differently.

    plain: returns the export's token ids of a text.
    read: returns the export's token ids of a prompt, like `prompt_ids`.
    """
    problems = []
    for prompt in prompts:
        if source(prompt)["input_ids"] != plain(prompt):
            problems.append(f"tokenized differently: {prompt[:40]!r}")
        # Try twice: a template can write the time, and a second can pass in between.
        elif all(prompt_ids(source, prompt) != read(prompt) for _ in range(2)):
            problems.append(f"rendered differently through the chat template: {prompt[:40]!r}")
    return problems

"""Ollama Modelfiles, with the chat format, stop tokens, and sampling settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

from stillhouse.data.turn_end import turn_end
from stillhouse.teachers.load_model import load_config, load_tokenizer
from stillhouse.teachers.model_source import AnyModel, source_of

PROBE = [
    {"role": "system", "content": "alpha"},
    {"role": "user", "content": "beta"},
    {"role": "assistant", "content": "gamma"},
    {"role": "user", "content": "delta"},
]
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
}
"""Sampling settings: their names in transformers and in Ollama."""
CONTEXT = 8192
"""Maximum context, because Ollama reserves memory for all of it: for the 40,960 tokens of Qwen 3
0.6B, the KV cache takes 4.7 GB."""


@dataclass(frozen=True)
class ChatFormat:
    """A chat format in which a message is `before`, its content, and `after`. {role} is replaced by
    the message's role."""

    before: str
    after: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The messages, followed by the text before the answer."""
        parts = [self.opening(one["role"]) + one["content"] + self.after for one in messages]
        return "".join(parts) + self.opening("assistant")

    def opening(self, role: str) -> str:
        return self.before.replace("{role}", role)

    def template(self) -> str:
        """The format as a Go template over Ollama's messages."""
        message = f"{self.opening('{{ .Role }}')}{{{{ .Content }}}}{self.after}"
        return f"{{{{ range .Messages }}}}{message}{{{{ end }}}}{self.opening('assistant')}"


FORMATS = {
    "ChatML": ChatFormat("<|im_start|>{role}\n", "<|im_end|>\n"),
    "Llama 3": ChatFormat("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "Phi": ChatFormat("<|{role}|>\n", "<|end|>\n"),
    "Zephyr": ChatFormat("<|{role}|>\n", "</s>\n"),
}


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The known format that renders a conversation exactly like the tokenizer's template; None if
    there is none."""
    written = _rendered(tokenizer, PROBE)
    return next((form for form in FORMATS.values() if form.render(PROBE) == written), None)


def default_system(tokenizer: Any, form: ChatFormat) -> str | None:
    """The system message that the template adds to a chat without one; None if it adds none."""
    user = [{"role": "user", "content": "beta"}]
    before, after = form.opening("system"), form.after + form.render(user)
    added = re.escape(before) + "(.*)" + re.escape(after)
    found = re.fullmatch(added, _rendered(tokenizer, user) or "", flags=re.DOTALL)
    return found[1] if found else None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """Render with the tokenizer's template, without the BOS token, which the runtime adds itself.
    None if the tokenizer has no template, or it rejects the messages."""
    if not tokenizer.chat_template:
        return None
    try:
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError):  # A template can reject a role.
        return None
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return str(written).removeprefix(tokenizer.bos_token if adds_bos else "")


def modelfile(model: AnyModel, gguf_name: str) -> str:
    """The text of a Modelfile for a GGUF file next to it. model: the folder it was exported from.

    If the chat template is not a known one, TEMPLATE is replaced by a comment that says so, and
    Ollama guesses the format from the template in the GGUF file.
    """
    tokenizer = load_tokenizer(model)
    config = load_config(model).get_text_config()
    lines = [f"FROM ./{gguf_name}"]
    own = _generation_config(source_of(model).path)
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    ends = own.get("eos_token_id")
    for index in ends if isinstance(ends, list) else [ends]:
        token = None if index is None else tokenizer.convert_ids_to_tokens(index)
        stops += [token] if token else []
    end = turn_end(tokenizer)
    stops += [end.text] if end is not None else []
    form = chat_format(tokenizer)
    if form is None:
        lines.append("# The chat template is not a known one, so Ollama reads it from the file.")
    else:
        lines.append(f'TEMPLATE """{form.template()}"""')
        stops.append(form.after.strip())
        system = default_system(tokenizer, form)
        if system and _ends_early(system):
            lines.append(
                "# A Modelfile cannot contain the system message of this model's template."
            )
        elif system:
            lines.append(f'SYSTEM """{system}"""')
    lines += [
        f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops) if not _ends_early(stop)
    ]
    lines.append(f"PARAMETER num_ctx {min(config.max_position_embeddings, CONTEXT)}")
    lines += [
        f"PARAMETER {theirs} {own[ours]}"
        for ours, theirs in SAMPLING.items()
        if own.get(ours) is not None
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if "\n" in text else f'"{text}"'


def _ends_early(text: str) -> bool:
    """Whether a line of the text would end its quotation early, since Ollama has no escapes."""
    return any(line.rstrip().endswith('"""') for line in text.splitlines()[:-1])


def _generation_config(model: Path) -> dict[str, Any]:
    """Values of the generation configuration that differ from transformers' defaults."""
    if not (model / "generation_config.json").is_file():
        return {}
    return dict(GenerationConfig.from_pretrained(model, local_files_only=True).to_diff_dict())

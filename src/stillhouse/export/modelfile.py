"""An Ollama Modelfile: the file, the chat format, stop tokens, and sampling settings."""

from __future__ import annotations

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
"""transformers' names of sampling settings, and Ollama's."""
CONTEXT = 8192
"""Maximum context: Ollama reserves memory for all of it, and the 40,960 tokens of Qwen 3 0.6B are
4.7 GB of keys and values."""


@dataclass(frozen=True)
class ChatFormat:
    """Every message is `before`, its content, `after`; {role} is replaced by the role."""

    before: str
    after: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The messages, and the text before the answer."""
        parts = [self.opening(one["role"]) + one["content"] + self.after for one in messages]
        return "".join(parts) + self.opening("assistant")

    def opening(self, role: str) -> str:
        return self.before.replace("{role}", role)

    def template(self) -> str:
        """The same as a Go template over Ollama's messages."""
        message = f"{self.opening('{{ .Role }}')}{{{{ .Content }}}}{self.after}"
        return f"{{{{ range .Messages }}}}{message}{{{{ end }}}}{self.opening('assistant')}"


FORMATS = {
    "ChatML": ChatFormat("<|im_start|>{role}\n", "<|im_end|>\n"),
    "Llama 3": ChatFormat("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "Phi": ChatFormat("<|{role}|>\n", "<|end|>\n"),
    "Zephyr": ChatFormat("<|{role}|>\n", "</s>\n"),
}


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The known format that writes a conversation exactly as the tokenizer's template does."""
    for form in FORMATS.values():
        if _rendered(tokenizer, PROBE) == form.render(PROBE):
            return form
    return None


def default_system(tokenizer: Any, form: ChatFormat) -> str | None:
    """The system message that the template adds if a chat has none."""
    user = [{"role": "user", "content": "beta"}]
    written, plain = _rendered(tokenizer, user), form.render(user)
    if written is None or written == plain or not written.endswith(plain):
        return None
    added = written.removesuffix(plain)
    before, after = form.opening("system"), form.after
    if added.startswith(before) and added.endswith(after):
        return added.removeprefix(before).removesuffix(after)
    return None


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """Render with the tokenizer's template, less the first token, which the runtime adds itself."""
    if not tokenizer.chat_template:
        return None
    try:
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError):  # a template may reject a role
        return None
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return str(written).removeprefix(tokenizer.bos_token if adds_bos else "")


def modelfile(model: AnyModel, gguf_name: str) -> str:
    """The Modelfile's text for a GGUF file next to it; `model`: the folder it was made from.

    If the chat template is unknown, a comment states it and TEMPLATE is omitted: Ollama
    then guesses it from the template in the GGUF file.
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
        lines.append("# The chat template is not a known one: Ollama reads it from the file.")
    else:
        lines.append(f'TEMPLATE """{form.template()}"""')
        stops.append(form.after.strip())
        system = default_system(tokenizer, form)
        if system and _ends_early(system):
            lines.append("# A Modelfile cannot hold the system message of this model's template.")
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
    """Whether a line of the text ends like the quoted text itself: Ollama has no escapes."""
    return any(line.rstrip().endswith('"""') for line in text.splitlines()[:-1])


def _generation_config(model: Path) -> dict[str, Any]:
    """Values of the generation config that differ from transformers' defaults."""
    if not (model / "generation_config.json").is_file():
        return {}
    return dict(GenerationConfig.from_pretrained(model, local_files_only=True).to_diff_dict())

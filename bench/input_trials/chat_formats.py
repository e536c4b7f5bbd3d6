"""Small chat templates, each written twice: in Jinja for the code under test, in Python as oracle.

Expected texts mark a control token ⟦like this⟧, which distinguishes it from text that merely
contains the token's string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATE = "⟦date⟧"


@dataclass(frozen=True)
class Turn:
    """A message as the generator means it. A weight of 0 means context only."""

    role: str
    text: str
    reasoning: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    weight: int = 1


@dataclass(frozen=True)
class ChatFormat:
    """A chat template and its oracle.

    before: renders the turns up to an answer. answer: renders the answer. end: the end-of-turn
    token, "" if there is none. refuses: features that make the template raise an error. drops:
    features that it silently leaves out.
    """

    name: str
    jinja: str
    special: tuple[str, ...]
    end: str
    before: Callable[[Sequence[Turn], str], str]
    answer: Callable[[Turn], str]
    refuses: frozenset[str] = frozenset()
    drops: frozenset[str] = frozenset()
    eos: str = ""
    bos: str | None = None

    @property
    def stop(self) -> str:
        return f"⟦{self.end}⟧" if self.end else ""


def mark(token: str) -> str:
    return f"⟦{token}⟧"


# --- ChatML ----------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chatml_before(turns: Sequence[Turn], _tools: str) -> str:
    start, end = mark("<|im_start|>"), mark("<|im_end|>")
    told = "".join(f"{start}{turn.role}\n{turn.text}{end}\n" for turn in turns)
    return f"{told}{start}assistant\n"


# --- Llama 3 ---------------------------------------------------------------------------------

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = LLAMA3.replace(
    "{{ '<|begin_of_text|>' }}",
    "{{ '<|begin_of_text|>Today Date: ' + strftime_now('%d %b %Y') + '\n' }}",
)


def _llama3_before(turns: Sequence[Turn], _tools: str, first: str = "") -> str:
    start, stop, end = map(mark, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    told = "".join(f"{start}{turn.role}{stop}\n\n{turn.text.strip()}{end}" for turn in turns)
    return f"{mark('<|begin_of_text|>')}{first}{told}{start}assistant{stop}\n\n"


def _dated_before(turns: Sequence[Turn], tools: str) -> str:
    return _llama3_before(turns, tools, f"Today Date: {DATE}\n")


# --- Mistral ---------------------------------------------------------------------------------

MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set loop_messages = messages %}{% endif %}{{ '<s>' }}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)


def _mistral_before(turns: Sequence[Turn], _tools: str) -> str:
    told, system = mark("<s>"), ""
    for turn in turns:
        if turn.role == "system":
            system = f"{turn.text}\n\n"
        elif turn.role == "user":
            told += f"[INST] {system}{turn.text} [/INST]"
            system = ""
        else:
            told += f" {turn.text}{mark('</s>')}"
    return told


# --- Gemma -----------------------------------------------------------------------------------

GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _gemma_before(turns: Sequence[Turn], _tools: str) -> str:
    start, end = mark("<start_of_turn>"), mark("<end_of_turn>")
    told = mark("<bos>")
    for turn in turns:
        role = "model" if turn.role == "assistant" else turn.role
        told += f"{start}{role}\n{turn.text.strip()}{end}\n"
    return f"{told}{start}model\n"


# --- tools and reasoning, like Qwen ----------------------------------------------------------

TOOLED = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}{{ '\n' + (tool | tojson) }}"
    "{% endfor %}<|im_end|>\n{% endif %}{% for message in messages %}"
    "{% if message.role in ('system', 'user', 'tool') %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tooled_answer(turn: Turn) -> str:
    calls = "".join(
        "<tool_call>"
        + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        + "</tool_call>"
        for name, arguments in turn.calls
    )
    thought = f"<think>\n{turn.reasoning}\n</think>\n\n" if turn.reasoning else ""
    return f"{thought}{turn.text}{calls}{mark('<|im_end|>')}"


def _tooled_before(turns: Sequence[Turn], tools: str) -> str:
    start, end = mark("<|im_start|>"), mark("<|im_end|>")
    told = f"{start}system\nTools:{tools}{end}\n" if tools else ""
    for turn in turns:
        if turn.role == "assistant":
            told += f"{start}assistant\n{_tooled_answer(turn)}\n"
        elif turn.role != "developer":
            told += f"{start}{turn.role}\n{turn.text}{end}\n"
    return f"{told}{start}assistant\n"


# --- defective templates ---------------------------------------------------------------------

SILENT = (
    "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def _silent_before(turns: Sequence[Turn], tools: str) -> str:
    return _chatml_before([t for t in turns if t.role in ("user", "assistant")], tools)


def _endless_before(turns: Sequence[Turn], _tools: str) -> str:
    return "".join(f"{t.role.capitalize()}: {t.text}\n" for t in turns) + "Assistant: "


_EXTRAS = frozenset({"tools", "calls", "reasoning"})
_IM = ("<|im_start|>", "<|im_end|>")
_L3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FORMATS = (
    ChatFormat(
        "chatml", CHATML, _IM, "<|im_end|>", _chatml_before,
        lambda turn: f"{turn.text}{mark('<|im_end|>')}", drops=_EXTRAS, eos="<|im_end|>",
    ),
    ChatFormat(
        "llama3", LLAMA3, _L3, "<|eot_id|>", _llama3_before,
        lambda turn: f"{turn.text.strip()}{mark('<|eot_id|>')}", drops=_EXTRAS, eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    ChatFormat(
        "dated", DATED, _L3, "<|eot_id|>", _dated_before,
        lambda turn: f"{turn.text.strip()}{mark('<|eot_id|>')}", drops=_EXTRAS, eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    ChatFormat(
        "mistral", MISTRAL, ("<s>", "</s>"), "</s>", _mistral_before,
        lambda turn: f" {turn.text}{mark('</s>')}", refuses=frozenset({"developer", "tool"}),
        drops=_EXTRAS, eos="</s>", bos="<s>",
    ),
    ChatFormat(
        "gemma", GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>",
        _gemma_before, lambda turn: f"{turn.text.strip()}{mark('<end_of_turn>')}",
        refuses=frozenset({"system", "developer", "tool"}), drops=_EXTRAS, eos="<eos>",
        bos="<bos>",
    ),
    ChatFormat(
        "tooled", TOOLED, _IM, "<|im_end|>", _tooled_before, _tooled_answer,
        drops=frozenset({"developer"}), eos="<|im_end|>",
    ),
    ChatFormat(
        "silent", SILENT, _IM, "<|im_end|>", _silent_before,
        lambda turn: f"{turn.text}{mark('<|im_end|>')}",
        drops=_EXTRAS | {"system", "developer", "tool"}, eos="<|im_end|>",
    ),
    ChatFormat(
        "endless", ENDLESS, ("<eos>",), "", _endless_before, lambda turn: turn.text,
        drops=_EXTRAS, eos="<eos>",
    ),
)  # fmt: skip


@cache
def tokenizer(format: ChatFormat) -> Any:
    """Make a tokenizer of bytes, with the format's control tokens and a padding token."""
    special = dict.fromkeys(["<|pad|>", *format.special, format.eos])
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=format.eos,
        bos_token=format.bos,
        pad_token="<|pad|>",
        additional_special_tokens=[t for t in format.special if t not in (format.eos, format.bos)],
        chat_template=format.jinja,
    )


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's mapping from printable characters to bytes, built from its definition."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(others)}


def spelled(ids: Sequence[int], format: ChatFormat) -> str:
    """Decode token ids, with control tokens marked."""
    words, table = tokenizer(format), _bytes_of_characters()
    told, buffer = "", bytearray()
    for token in words.convert_ids_to_tokens(list(ids)):
        if token in table:
            buffer.append(table[token])
        else:
            told += buffer.decode("utf-8", "replace") + mark(token)
            buffer.clear()
    return told + buffer.decode("utf-8", "replace")

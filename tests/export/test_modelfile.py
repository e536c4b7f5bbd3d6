"""A Modelfile renders a chat like the model's own template, or omits the template."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import GenerationConfig

from stillhouse.export.modelfile import FORMATS, chat_format, default_system, modelfile
from tests import tiny

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny.llama()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(tmp_path)
    words = tiny.tokenizer()
    words.chat_template = CHATML
    words.save_pretrained(tmp_path)
    return tmp_path


def test_a_known_template_is_written_for_ollama(folder: Path) -> None:
    assert modelfile(folder, "toy-q8_0.gguf") == (
        "FROM ./toy-q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """Be kind."""\n'
        'PARAMETER stop "<|end|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 256\n"
        "PARAMETER temperature 0.6\n"
        "PARAMETER top_p 0.9\n"
    )


def test_every_token_that_ends_an_answer_is_a_stop(folder: Path) -> None:
    """Llama 3's chats end with a different token than its texts."""
    words = tiny.tokenizer()
    ends = [words.eos_token_id, words.convert_tokens_to_ids("<|user|>")]
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    stops = [line for line in modelfile(folder, "toy.gguf").splitlines() if " stop " in line]
    assert [line.split()[-1] for line in stops] == ['"<|end|>"', '"<|user|>"', '"<|im_end|>"']


def test_the_context_is_limited_to_8192_tokens(folder: Path) -> None:
    tiny.llama(max_position_embeddings=40960).save_pretrained(folder)
    assert "PARAMETER num_ctx 8192\n" in modelfile(folder, "toy.gguf")


@pytest.mark.parametrize("name", FORMATS)
def test_a_chat_format_is_recognized_by_what_the_template_renders(name: str) -> None:
    form = FORMATS[name]
    words = tiny.tokenizer()
    head, tail = form.before.split("{role}")
    words.chat_template = (
        f"{{% for message in messages %}}{head}{{{{ message['role'] }}}}{tail}"
        f"{{{{ message['content'] }}}}{form.after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{form.opening('assistant')}{{% endif %}}"
    )
    assert chat_format(words) == form
    assert default_system(words, form) is None


def test_an_unknown_template_is_left_out(folder: Path) -> None:
    tiny.tokenizer().save_pretrained(folder)
    written = modelfile(folder, "toy.gguf")
    assert "TEMPLATE" not in written
    assert 'PARAMETER stop "<|end|>"' in written


def read_by_ollama(text: str) -> list[tuple[str, str]]:
    """Commands and values. A quoted value ends at the first line that ends in its quotes."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        if line.startswith("#"):
            continue
        name, value = re.split(" (?=[^ ])", line.removeprefix("PARAMETER "), maxsplit=1)
        quotes = next((each for each in ('"""', '"') if value.startswith(each)), "")
        while quotes and (len(value) < 2 * len(quotes) or not value.rstrip().endswith(quotes)):
            value += f"\n{next(lines)}"
        size = len(quotes)
        found.append((name, value[size : len(value) - size]))
    return found


@pytest.mark.parametrize("system", ['Say "yes".', 'a\n"quote"', '"', '"""', 'two\n""" lines'])
def test_quotes_in_texts_and_stops_are_kept(folder: Path, system: str) -> None:
    words = tiny.tokenizer()
    words.add_special_tokens({"eos_token": '<"\n>'})
    words.chat_template = CHATML.replace("Be kind.", system)
    words.save_pretrained(folder)
    found = read_by_ollama(modelfile(folder, "toy.gguf"))
    assert ("SYSTEM", system) in found
    assert ("stop", '<"\n>') in found
    assert ("temperature", "0.6") in found


def test_a_system_message_that_a_modelfile_cannot_hold_is_left_out(folder: Path) -> None:
    words = tiny.tokenizer()
    words.chat_template = CHATML.replace("Be kind.", 'Code is in """\nPARAMETER stop "e"')
    words.save_pretrained(folder)
    written = modelfile(folder, "toy.gguf")
    assert "SYSTEM" not in written
    assert ("stop", "e") not in read_by_ollama(written)
    assert "# A Modelfile cannot contain the system message" in written


def test_a_tokenizer_without_a_template_has_no_format() -> None:
    words = tiny.tokenizer()
    words.chat_template = None
    assert chat_format(words) is None


def test_a_template_that_rejects_a_system_message_is_unknown() -> None:
    words = tiny.tokenizer()
    words.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    assert chat_format(words) is None

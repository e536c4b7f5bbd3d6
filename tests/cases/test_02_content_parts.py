"""Content in OpenAI's form, a list of text parts, is joined if the template expects strings."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.errors import DataError

from ..data.learned import learned, shown
from ..data.toys import CHATML, byte_level

PARTS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of Norway?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Oslo."}]},
    ]
}
TEMPLATES = {
    "prints whatever it is given (Llama 3, Gemma)": CHATML,
    "accepts only strings (Qwen 3)": CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['content'] is string else '' }}"
    ),
    "concatenates strings (Qwen 2.5, Phi 3)": CHATML.replace(
        "{{ m['role'] }}\n{{ m['content'] }}", "{{ m['role'] + '\n' + m['content'] }}"
    ),
    "accepts only parts": CHATML.replace(
        "{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_text_parts_are_learned_like_a_string(template: str) -> None:
    tokenizer = byte_level(template)
    assert learned(PARTS, tokenizer) == ["Oslo.<|im_end|>"]
    assert "\nWhat is the capital of Norway?<|im_end|>" in shown(PARTS, tokenizer)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "..."}},
        {"type": "refusal", "refusal": "No."},
        {"type": "text"},
        "bare",
    ],
)
def test_a_part_that_is_not_text_is_rejected_with_its_type(part: Any) -> None:
    content = [{"type": "text", "text": "Look:"}, part]
    answer = {"role": "assistant", "content": "Oslo."}
    with pytest.raises(DataError, match=r"messages\[0\]` has a part that is not text") as error:
        learned({"messages": [{"role": "user", "content": content}, answer]}, byte_level())
    assert error.value.where == "rows.jsonl:3"

"""Text that is inserted into Markdown is shown literally."""

from __future__ import annotations

import pytest

from stillhouse.markdown import fenced, inert


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain, 81%", "plain, 81%"),
        ("<b>&lt;", "\\<b\\>&amp;lt;"),
        ("my_model *x* `y` [z](u) a|b ~c~", "my_model \\*x\\* \\`y\\` \\[z\\](u) a\\|b \\~c\\~"),
        ("_x_ __init__ a__b", "\\_x\\_ \\_\\_init\\_\\_ a\\_\\_b"),
        ("one\n\n# two\x1b", "one # two␛"),
    ],
)
def test_markup_in_a_text_is_escaped(text: str, written: str) -> None:
    assert inert(text) == written


@pytest.mark.parametrize(("text", "fence"), [("a", "```"), ("```\na", "````"), ("`````", "`" * 6)])
def test_a_text_cannot_end_its_code_block(text: str, fence: str) -> None:
    assert fenced(text, "yaml") == f"{fence}yaml\n{text}\n{fence}"

"""Terminal output in which text from models, servers, and files cannot control the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# All control characters except tab and newline, and those that change the text's direction.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Replace control characters with symbols or escapes: ESC becomes ␛."""
    return _CONTROL.sub(_shown, text)


def json_line(value: Any) -> str:
    """Serialize a value as JSON on one line. Control characters, and characters that standard
    output's encoding may lack, become JSON escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    written = json.dumps(value, ensure_ascii=encoding.lower() != "utf-8")
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"\\u{code:04x}"


def write_output(line: str) -> None:
    """Write a line to standard output unchanged, and flush. Raises an OSError that names it."""
    if sys.stdout is None:  # it is closed
        return
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _of_output(error) from None


def _of_output(error: OSError) -> OSError:
    return OSError(error.errno, error.strerror, "standard output")


class Terminal(Console):
    """A rich console that makes control characters visible and does not interpret markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print like rich's console, but do not let a full disk under the log that receives
        standard error end a run."""
        try:
            super().print(*objects, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.stderr:
                raise _of_output(error) from None

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and _CONTROL.search(segment.text):
                segment = Segment(visible(segment.text), segment.style)
            yield segment

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)  # so that its width is correct

    def write_line(self, text: str = "", style: str | None = None) -> None:
        """Write a line, or a message of several lines, of any length."""
        self.print(Text(visible(text)), style=style, soft_wrap=True)

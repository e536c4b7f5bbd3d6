"""Files in other encodings are read if the encoding is certain, or rejected with a fix."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.data.row_reader import read_rows
from stillhouse.errors import DataError

TEXTS = {
    "latin_1": "Où est la bibliothèque, à côté du café ?",
    "cp1252": "He said: “It’s 5 €” – and left…",
    "mac_roman": "Das Mädchen isst später Äpfel für sich.",
    "cp850": "Das Mädchen isst später Äpfel für sich.",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "iso8859_2": "Zażółć gęślą jaźń, proszę pana.",
    "cp1254": "Günaydın, bugün şehir çok güzel ve ağaçlar yeşil.",
    "cp1251": "Привет, как дела сегодня?",
    "koi8_r": "Привет, как дела сегодня?",
    "cp1253": "Καλημέρα κόσμε, τι κάνεις;",
    "cp1255": "האם אתה יכול לעזור לי עם הכרטיס שלי?",
    "cp1256": "مرحبا بالعالم، كيف حالك اليوم؟",
    "cp874": "บัตรของฉันหาย ช่วยด้วย",
    "cp932": "こんにちは世界。カードが届きません。",
    "euc_jp": "こんにちは世界。カードが届きません。",
    "gb18030": "你好，世界。我的卡丢了。",
    "big5": "你好，世界。我的卡片不見了。",
    "cp949": "안녕하세요 세계. 카드가 없어졌어요.",
    "utf_16_le": "hello, wörld",
    "utf_16_be": "中文字符没有空格",
    "utf_32_le": "hello, wörld",
    "utf_32_be": "hello, wörld",
}


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return caught.value


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("extension", [".csv", ".csv.gz"])
def test_the_command_in_the_message_converts_the_file(
    encoding: str, extension: str, tmp_path: Path
) -> None:
    path = tmp_path / f"it's [1]{extension}"
    content = f'text,label\n"{TEXTS[encoding]}",a\n'.encode(encoding)
    path.write_bytes(gzip.compress(content) if extension.endswith(".gz") else content)
    command = str(refused(path).fix).partition("the new file: ")[2].partition(", if line")[0]
    subprocess.run(command, shell=True, check=True)
    (row,) = read_rows(tmp_path / "utf8-it's [1].csv")
    assert row[0] == {"text": TEXTS[encoding], "label": "a"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("a.csv", "text\tlabel\r\nhéllo 你\ta\r\n".encode),
        ("a.jsonl", '{"text": "héllo 你", "label": "a"}\n'.encode),
        ("a.json", '[{"text": "héllo 你", "label": "a"}]'.encode),
    ],
)
def test_a_file_with_a_byte_order_mark_is_read(
    encoding: str, name: str, made: Callable[[str], bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(made(encoding))
    ((row, _),) = read_rows(tmp_path / name)
    assert row == {"text": "héllo 你", "label": "a"}


def test_a_file_in_two_encodings_is_rejected_with_the_line_to_correct(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("été\n".encode() + "café\n".encode("latin-1"))
    error = refused(path)
    assert "byte 0xe9 in line 2" in error.what
    assert "iconv" not in str(error.fix)
    assert "write line 2 again (as ISO-8859-1: 'café')" in str(error.fix)
    path.write_bytes("cut off after schön".encode() + "ö".encode()[:1])
    assert "truncated" in refused(path).what


def test_byte_order_marks_of_concatenated_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n\ufeff{"text": "b"}\n')
    (tmp_path / "a.txt").write_text("\ufeffa\n\ufeffb\n")
    for name in ("a.jsonl", "a.txt"):
        assert [row["text"] for row, _ in read_rows(tmp_path / name)] == ["a", "b"]

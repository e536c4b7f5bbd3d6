"""Every extra can be resolved with constraints.txt, from metadata alone; nothing is installed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

uv = pytest.importorskip("uv")

pytestmark = pytest.mark.install

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = ROOT / "constraints.txt"


def resolve(*arguments: str, requirements: str | None = None) -> dict[str, str]:
    """The version of each package in a new environment on Linux x86-64 with Python 3.11."""
    source = "pyproject.toml" if requirements is None else "-"
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run(
        [uv.find_uv_bin(), "pip", "compile", "-q", source, *platform, "--no-annotate", *arguments],
        cwd=ROOT,
        input=requirements,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, flags=re.MULTILINE))


def pin(name: str) -> str:
    (version,) = re.findall(rf"^{name}==(\S+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    return str(version)


@pytest.mark.parametrize("extras", [*PROJECT["optional-dependencies"], "vllm,ray"])
def test_an_extra_can_be_resolved_with_the_constraints(extras: str) -> None:
    options = [f"--extra={extra}" for extra in extras.split(",")]
    found = resolve(*options, "-c", str(CONSTRAINTS))
    assert {name: found[name] for name in ("torch", "transformers")} == {
        "torch": pin("torch"),
        "transformers": pin("transformers"),
    }


def test_the_llama_server_can_be_resolved_with_the_constraints() -> None:
    found = resolve("-c", str(CONSTRAINTS), requirements="llama-cpp-python[server]")
    assert found["fastapi"] == pin("fastapi")


def test_vllm_without_constraints_allows_the_tested_transformers() -> None:
    """5.20 is the oldest that Stillhouse supports, and 5.23 the one it is tested with."""
    found = resolve("--extra=vllm")
    version = tuple(int(part) for part in found["transformers"].split(".")[:2])
    assert (5, 23) <= version < (6, 0)

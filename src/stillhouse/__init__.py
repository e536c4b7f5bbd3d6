"""Distill language models: a small student learns to reproduce a large teacher's behavior.

    import stillhouse
    result = stillhouse.run("recipes/demo.yaml")
    result.evaluation.result("student").fidelity.kl

The pieces have the names of the concepts and work alone: `stillhouse.objectives`, `.data`,
`.teachers`, `.students`, `.training`, `.evaluate`, `.export`, `.report`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stillhouse.errors import StillhouseError

if TYPE_CHECKING:
    from stillhouse.commands import run
    from stillhouse.pipeline.kind import RunResult

__version__ = "0.1.0"
__all__ = ["RunResult", "StillhouseError", "__version__", "run"]


_OWNERS = {"run": "commands", "RunResult": "pipeline.kind"}


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: only what is used is imported.
    if name in _OWNERS:
        from importlib import import_module

        return getattr(import_module(f"stillhouse.{_OWNERS[name]}"), name)
    raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")

"""A teacher's measurements and hidden states on the held-out text, kept for several evaluations.

Hidden states are stored in the dtype that the teacher computes in, so that a student's results are
the same as in an evaluation that runs the teacher. (The encoding `hidden` of signal stores is
always bfloat16.)

Shapes: N supervised rows of a batch, D hidden width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.disk_errors import disk_errors
from stillhouse.evaluation.fidelity import HeldoutAnswers
from stillhouse.evaluation.results import ModelResult
from stillhouse.processes import wait_for_all
from stillhouse.shared_work import Processes
from stillhouse.signals import DenseSignal, LMHead

FILE = "teacher.json"


@dataclass(frozen=True)
class KeptTeacher:
    """A teacher's measurements, saved in a folder.

    folder: contains the hidden states.
    texts: answers to the prompts; None if not measured.
    dtype: the dtype that the teacher computed in.
    """

    folder: Path
    result: ModelResult
    texts: list[str] | None
    dtype: str

    @classmethod
    def load(cls, folder: Path) -> Self:
        raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
        result = TypeAdapter(ModelResult).validate_python(raw["result"])
        return cls(folder, result, raw["texts"], raw["dtype"])

    def save(self) -> None:
        """Save everything but the hidden states. Raises RunError if the file cannot be written."""
        facts = {"result": asdict(self.result), "texts": self.texts, "dtype": self.dtype}
        with disk_errors(self.folder):
            (self.folder / FILE).write_text(json.dumps(facts), encoding="utf-8")

    def answers(self, head: LMHead, processes: Processes) -> HeldoutAnswers:
        """Load this process's share of the rows, however many processes saved them."""
        files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            with safe_open(path, "pt") as opened:
                files |= dict.fromkeys(opened.keys(), path)
        numbers = range(processes.own, len(files) // 2, processes.count)
        hidden, targets = [], []
        for number in numbers:
            with safe_open(files[f"hidden {number}"], "pt") as opened:
                hidden.append(opened.get_tensor(f"hidden {number}"))
                targets.append(opened.get_tensor(f"targets {number}"))
        width = head.weight_VD.shape[1]
        hidden_ND = torch.cat(hidden) if hidden else head.weight_VD.new_empty(0, width).cpu()
        targets_N = torch.cat(targets) if targets else torch.empty(0, dtype=torch.long)
        sizes = tuple(map(len, targets))
        return HeldoutAnswers(DenseSignal(hidden_ND, head), targets_N, sizes, processes)


def save_rows(folder: Path, answers: HeldoutAnswers) -> None:
    """Save the hidden states. Every process must call this with its share of the rows.

    Raises RunError if the files cannot be written.
    """
    processes = answers.processes
    tensors: dict[str, Tensor] = {}
    for place, rows in enumerate(answers.slices()):
        number = place * processes.count + processes.own
        tensors[f"hidden {number}"] = answers.signal.hidden_ND[rows].contiguous()
        tensors[f"targets {number}"] = answers.targets_N[rows].contiguous()
    with disk_errors(folder):
        name = f"rows-{processes.own + 1:05}-of-{processes.count:05}.safetensors"
        save_file(tensors, folder / name)
    wait_for_all()

"""A training with a peer, in the peers' environment. Imports nothing from Stillhouse.

    python -m bench.peer_trainers KIND JOB.json

`bench.peer_runs` starts this module and documents the job. All kinds use the same windows,
optimizer, and learning rate. The windows replace each kind's own data path; nothing else is
changed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

Rows = list[dict[str, Any]]


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def forget_peak() -> None:
    """Reset the peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith("VmHWM"))
    return int(found.split()[1]) * 1024


class Report(TrainerCallback):
    """Prints a line with the time after each optimizer step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        say(whole_peak=peak_bytes())
        forget_peak()
        say(began=time.perf_counter())

    def on_step_end(self, _args: Any, state: Any, _control: Any, **__: Any) -> None:
        say(step=state.global_step, at=time.perf_counter(), cpu=time.process_time())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        say(ended=time.perf_counter(), training_peak=peak_bytes())


class KlTrainer(Trainer):
    """The common approach: a transformers Trainer whose loss is the KL of the logits."""

    teacher: Any = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            teacher = self.teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
        kept = inputs["labels"][:, 1:] != -100
        log_q = F.log_softmax(outputs.logits[:, :-1][kept], -1)
        log_p = F.log_softmax(teacher[kept], -1)
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        loss = total / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def collate(rows: Rows) -> dict[str, torch.Tensor]:
    """Stack rows; all tokens except the first are supervised."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100
    mask = torch.ones_like(ids)
    prompts = {"prompts": ids[:, :1], "prompt_attention_mask": mask[:, :1]}  # of GKD
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **prompts}


def settings(job: dict[str, Any]) -> dict[str, Any]:
    micro = job["micro"] or job["batch"]
    return {
        "output_dir": job["out"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job["batch"] // micro,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": job["seed"],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": job["checkpoint_every"],
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def make_trainer(kind: str, job: dict[str, Any]) -> Any:
    from datasets import Dataset

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(job[role], dtype=torch.float32)
        for role in ("student", "teacher")
    )
    teacher.eval().requires_grad_(False)
    words = AutoTokenizer.from_pretrained(job["teacher"])
    windows = np.load(job["windows"])[: job["steps"] * job["batch"]].tolist()
    rows = Dataset.from_dict({"input_ids": windows, "prompt": [""] * len(windows)})
    common = {"model": student, "train_dataset": rows, "callbacks": [Report()]}
    if kind == "huggingface":
        arguments = TrainingArguments(**settings(job))
        trainer = KlTrainer(args=arguments, data_collator=collate, **common)
        trainer.teacher = teacher
        return trainer
    if kind == "trl_gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        config = GKDConfig(**settings(job), lmbda=0.0, beta=0.0, temperature=1.0, max_length=None)
        return GKDTrainer(
            args=config,
            teacher_model=teacher,
            processing_class=words,
            data_collator=collate,
            **common,
        )
    assert kind == "trl_distillation"
    return trl_distillation(job, teacher, words, common)


def trl_distillation(job: dict[str, Any], teacher: Any, words: Any, common: dict[str, Any]) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    class OnWindows(DistillationTrainer):
        """TRL's trainer, with the windows in place of the text that the student writes."""

        def _generate_and_score_completions(self, inputs: Rows) -> dict[str, torch.Tensor]:
            batch = collate(inputs)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            return {
                "prompt_ids": ids[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": ids[:, 1:],
                "completion_mask": mask[:, 1:],
                "num_items_in_batch": mask[:, 1:].sum().float(),
            }

    config = DistillationConfig(**settings(job), beta=0.0, temperature=1.0)
    return OnWindows(args=config, teacher_model=teacher, processing_class=words, **common)


def main(kind: str, path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    trainer = make_trainer(kind, job)
    found = get_last_checkpoint(job["out"]) if Path(job["out"]).is_dir() else None
    say(resumes_from=found and Path(found).name)
    trainer.train(resume_from_checkpoint=found)
    trainer.model.save_pretrained(Path(job["out"]) / "model")
    say(saved=True, whole_peak=peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

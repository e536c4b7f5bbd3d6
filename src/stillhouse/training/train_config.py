"""The recipe section `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.field_types import (
    Beta,
    Count,
    Epochs,
    GradientNorm,
    LearningRate,
    PartialShareOrZero,
    PathText,
    Share,
    Steps,
    WeightDecay,
)
from stillhouse.generation.generation_config import Precision
from stillhouse.section import OneOf, Section
from stillhouse.training.on_policy_config import OnPolicyRecipe

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "wsd": "warmup_stable_decay",
    "constant": "constant_with_warmup",
}
"""Learning-rate schedules, by name, with transformers' names."""

ORIGINAL = "teacher"
"""The entry of `train.teachers` for the recipe's own teacher."""

HARMLESS = frozenset(
    (
        "micro_batch_size",
        "gradient_checkpointing",
        "shard",
        "shard_within",
        "offload_teacher",
        "checkpoint_every",
        "keep_checkpoints",
        "report_to",
    )
)
"""Keys that affect how training is computed and stored, but not its result. They can be changed
before resuming."""


def training_key(settings: TrainRecipe) -> dict[str, Any]:
    """The settings that affect the result of training."""
    found = settings.model_dump(mode="json", exclude={"teachers", *HARMLESS})
    own = found.pop("on_policy")
    if own is not None:
        found["on_policy"] = {**own, "generator": own["generator"]["kind"]}
        del found["on_policy"]["batch"]
    return found


class StepsRecipe(Section):
    """Settings of the optimizer steps, for any kind of training."""

    epochs: Epochs = 1.0
    batch_size: Count = Field(8, description="Windows per optimizer step, over all processes.")
    learning_rate: LearningRate = 1e-4
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    warmup: PartialShareOrZero = Field(0.05, description="Share of all steps used for warmup.")
    weight_decay: WeightDecay = 0.0
    max_grad_norm: GradientNorm = 1.0
    precision: Precision = Field("auto", description="Precision of matrix products.")
    checkpoint_every: Steps = Field(100, description="Optimizer steps between checkpoints.")


class TrainRecipe(StepsRecipe):
    teachers: list[PathText] = Field(
        default=[],
        description="Models to learn from instead of the teacher, which is still used for "
        "evaluation; in the same forms as teacher.model, or `teacher` for the teacher itself. The "
        "loss is the mean over these models. Their tokenizers can differ from the student's.",
    )
    max_steps: Steps | None = Field(None, description="Stop after this many optimizer steps.")
    micro_batch_size: Count | None = Field(
        None,
        description="Windows per forward pass of one process; null: on a GPU, the process's share "
        "of batch_size; on a CPU, at most 256 tokens, or 1024 with bfloat16 matrix products.",
    )
    decay: Share = Field(0.2, description="With schedule: wsd, share of all steps used for decay.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Dtype of weights and gradients. bfloat16 halves their memory; weights are "
        "rounded stochastically after each step.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw_8bit: AdamW with 8-bit instead of float32 moments; muon: Muon for the "
        "layers' matrices, and AdamW for the rest.",
    )
    freeze_head: bool = Field(
        False, description="Do not train the head, nor embeddings that are tied to it."
    )
    gradient_checkpointing: bool = False
    shard: Literal["none", "student", "teacher", "both", "auto"] = Field(
        "auto",
        description="Models to shard over the processes of a torchrun (FSDP2). auto: those that do "
        "not fit on one GPU.",
    )
    shard_within: Literal["all", "node"] = Field(
        "all", description="node: shard within each node, and keep a copy on every node."
    )
    offload_teacher: bool = Field(
        False, description="Keep a sharded teacher's weights in host memory."
    )
    keep_checkpoints: Count = 2
    evaluate_every: Steps | None = Field(
        None, description="Optimizer steps between held-out evaluations; null: never."
    )
    early_stop: Count | None = Field(
        None, description="Stop after this many evaluations without an improvement."
    )
    on_policy: OnPolicyRecipe | None = Field(
        None,
        description="Let the student generate a share of the text that it learns from; null: learn "
        "from data alone.",
    )
    report_to: list[str] = Field(
        default=[], description="Trackers of transformers.Trainer: tensorboard, wandb, trackio."
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> TrainRecipe:
        if self.weights == "bfloat16" and self.precision == "float32":
            raise ValueError(
                "weights: bfloat16 requires matrix products in bfloat16: remove precision, or set "
                "weights: float32"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1 + 1e-6:
            raise ValueError(
                f"warmup ({self.warmup:g}) and decay ({self.decay:g}) add up to more than all "
                "steps: lower one of them"
            )
        if self.early_stop is not None and self.evaluate_every is None:
            raise ValueError("early_stop needs evaluate_every: set both, or neither")
        if self.hands_over_weights and self.shard in ("student", "both"):
            raise ValueError(
                "a sharded student's weights cannot be handed over to vLLM: set shard to none or "
                "teacher, or on_policy.generator.kind to local"
            )
        return self

    @property
    def only_own_text(self) -> bool:
        """Whether the student generates all text that it learns from."""
        return self.on_policy is not None and self.on_policy.share == 1

    @property
    def hands_over_weights(self) -> bool:
        """Whether vLLM gets the student's weights, which must then not be sharded."""
        return self.on_policy is not None and self.on_policy.generator.kind != "local"

    @property
    def products(self) -> Literal["auto", "float32", "bfloat16"]:
        """The precision of matrix products, which is bfloat16 if the weights are."""
        return "bfloat16" if self.weights == "bfloat16" else self.precision

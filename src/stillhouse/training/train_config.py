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
"""Learning-rate schedules, with transformers' names for them."""

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
"""Keys that decide how a training is computed and stored, and not what comes out. They may change
in between a kill and its resume."""


def training_key(settings: TrainRecipe) -> dict[str, Any]:
    """What identifies the result of a training, of its settings."""
    found = settings.model_dump(mode="json", exclude={"teachers", *HARMLESS})
    own = found.pop("on_policy")
    if own is not None:
        found["on_policy"] = {**own, "generator": own["generator"]["kind"]}
        del found["on_policy"]["batch"]
    return found


class StepsRecipe(Section):
    """How a training of any kind steps."""

    epochs: Epochs = 1.0
    batch_size: Count = Field(8, description="Windows in one optimizer step, all processes.")
    learning_rate: LearningRate = 1e-4
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    warmup: PartialShareOrZero = Field(0.05, description="Share of all steps.")
    weight_decay: WeightDecay = 0.0
    max_grad_norm: GradientNorm = 1.0
    precision: Precision = Field("auto", description="Precision of matrix products.")
    checkpoint_every: Steps = Field(100, description="Optimizer steps between checkpoints.")


class TrainRecipe(StepsRecipe):
    teachers: list[PathText] = Field(
        default=[],
        description="Models to learn from in place of the teacher, which stays the measure; as "
        "teacher.model, or `teacher` itself. The loss is the mean of theirs. They may have other "
        "tokenizers.",
    )
    max_steps: Steps | None = Field(None, description="Stop after this many optimizer steps.")
    micro_batch_size: Count | None = Field(
        None,
        description="Windows in one forward pass of one process; null: on a GPU, its share of "
        "batch_size; on a CPU, up to 256 tokens of that, or 1024 if products are in bfloat16.",
    )
    decay: Share = Field(0.2, description="wsd: share that decays.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number type of weights and gradients. bfloat16: half the memory, rounded "
        "stochastically after each step.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw_8bit: AdamW with moments in 8 bits instead of float32. muon: Muon for "
        "the matrices of layers, AdamW for the rest.",
    )
    freeze_head: bool = Field(
        False, description="Do not train the head, or embeddings that are tied to it."
    )
    gradient_checkpointing: bool = False
    shard: Literal["none", "student", "teacher", "both", "auto"] = Field(
        "auto",
        description="Models whose weights are sharded over the processes of a torchrun (FSDP2). "
        "auto: what does not fit on one GPU.",
    )
    shard_within: Literal["all", "node"] = Field(
        "all", description="node: shard inside each node, and keep a copy in every node."
    )
    offload_teacher: bool = Field(
        False, description="Keep a sharded teacher's weights in the host's memory."
    )
    keep_checkpoints: Count = 2
    evaluate_every: Steps | None = Field(
        None, description="Optimizer steps between held-out measurements; null: never."
    )
    early_stop: Count | None = Field(
        None, description="Stop after this many measurements without a better one."
    )
    on_policy: OnPolicyRecipe | None = Field(
        None,
        description="The student writes a share of the text it learns from; null: it learns from "
        "data alone.",
    )
    report_to: list[str] = Field(
        default=[], description="Trackers of transformers.Trainer: tensorboard, wandb, trackio."
    )

    @model_validator(mode="after")
    def _narrow_weights_need_narrow_products(self) -> TrainRecipe:
        if self.weights == "bfloat16" and self.precision == "float32":
            raise ValueError(
                "weights in bfloat16 are multiplied in bfloat16: leave precision out, or set "
                "weights: float32"
            )
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainRecipe:
        if self.schedule == "wsd" and self.warmup + self.decay > 1 + 1e-6:
            raise ValueError(
                f"warmup ({self.warmup:g}) and decay ({self.decay:g}) are more than all steps: "
                "lower one"
            )
        return self

    @model_validator(mode="after")
    def _early_stop_needs_measurements(self) -> TrainRecipe:
        if self.early_stop is not None and self.evaluate_every is None:
            raise ValueError("early_stop needs evaluate_every: set both, or neither")
        return self

    @model_validator(mode="after")
    def _engine_gets_complete_weights(self) -> TrainRecipe:
        own = self.on_policy
        engine = own is not None and own.generator.kind != "local"
        if engine and self.shard in ("student", "both"):
            raise ValueError(
                "the weights of a sharded student are not handed over to vLLM: set shard to none "
                "or teacher, or on_policy.generator.kind to local"
            )
        return self

    @property
    def only_own_text(self) -> bool:
        """Whether the student writes all text that it learns from."""
        return self.on_policy is not None and self.on_policy.share == 1

    @property
    def products(self) -> Literal["auto", "float32", "bfloat16"]:
        """The precision of matrix products, which weights in bfloat16 decide."""
        return "bfloat16" if self.weights == "bfloat16" else self.precision

"""The recipe section `train`, with `train.on_policy`: text that the student generates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.field_types import (
    AnswerTokens,
    Beta,
    Count,
    Epochs,
    GradientNorm,
    LearningRate,
    PartialShareOrZero,
    PathText,
    SamplingTemperature,
    Share,
    ShareOrZero,
    SmallCount,
    Steps,
    Tokens,
    TokensOrZero,
    WeightDecay,
)
from stillhouse.generation.generation_config import Precision
from stillhouse.generation.rollout_config import LocalRollouts, RolloutsRecipe
from stillhouse.objectives.objective_config import LogitsTerm, require_different
from stillhouse.section import OneOf, Section
from stillhouse.synthesis.synthesize_config import PromptFormat

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


class OnPolicyPrompts(Section):
    """Prompts from a file, or from a dataset on the Hugging Face Hub."""

    path: PathText | None = Field(
        None,
        description="Text, JSONL, JSON, CSV, TSV, or Parquet file, optionally compressed, or a log "
        "of chat completions.",
    )
    format: PromptFormat = Field("auto", description="auto: by the file's extension.")
    dataset: PathText | None = Field(
        None, description="Dataset on the Hub, or a local folder that `datasets` can load."
    )
    config: str | None = None
    split: str = "train"
    key: str = Field("prompt", description="Column or key with the prompt.")
    limit: Tokens | None = Field(None, description="Maximum number of prompts to use.")
    system: str | None = Field(None, description="System prompt for prompts that do not have one.")

    @model_validator(mode="after")
    def _come_from_one_place(self) -> OnPolicyPrompts:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("set either path or dataset")
        return self


class OnPolicyRecipe(Section):
    """On-policy distillation: the student generates answers, the teacher scores each token of them,
    and the student learns from these scores."""

    prompts: OnPolicyPrompts | None = Field(
        None,
        description="Prompts for the student; null: the chats in the training data, without their "
        "last answer, and the beginnings of its texts.",
    )
    share: ShareOrZero = Field(
        0.5, description="Share of each optimizer step's rows that the student generates."
    )
    window: Steps = Field(
        4,
        description="Optimizer steps for which answers are generated at once; 1: strictly "
        "on-policy.",
    )
    samples: SmallCount = Field(1, description="Answers to generate for each prompt.")
    temperature: SamplingTemperature = Field(1.0, description="Sampling temperature; 0: greedy.")
    top_p: Share = Field(1.0, description="Nucleus sampling: keep tokens up to this probability.")
    max_tokens: AnswerTokens = Field(128, description="Maximum tokens of an answer.")
    cut_off: Literal["keep", "drop"] = Field(
        "keep", description="Whether to learn from answers that reach max_tokens."
    )
    terms: list[LogitsTerm] = Field(
        default=[LogitsTerm(divergence="reverse_kl")],
        min_length=1,
        description="Divergences on the student's own text; their weighted sum is the loss.",
    )
    cold_start_tokens: TokensOrZero = Field(
        0, description="Supervised tokens of `data` to train on before the student generates."
    )
    teacher_tokens: TokensOrZero = Field(
        0, description="Tokens at the start of each answer that the teacher generates."
    )
    batch: Count = Field(32, description="Answers generated at once, with generator.kind: local.")
    generator: RolloutsRecipe = Field(
        LocalRollouts(), description="Where answers are generated: in this process, or by vLLM."
    )

    @model_validator(mode="after")
    def _terms_are_for_own_text(self) -> OnPolicyRecipe:
        for term in self.terms:
            if term.divergence == "cross_entropy":
                raise ValueError(
                    "cross_entropy on its own text teaches the student only what it already does: "
                    "use a divergence from the teacher in on_policy.terms"
                )
            if term.layers is not None:
                raise ValueError("on_policy.terms apply only to the model's output: remove layers")
        require_different(self.terms)
        if not any(term.largest_weight for term in self.terms):
            raise ValueError("every term has weight 0, so nothing would be learned: raise one")
        if self.teacher_tokens >= self.max_tokens:
            raise ValueError(
                f"teacher_tokens ({self.teacher_tokens}) must be less than max_tokens "
                f"({self.max_tokens}), to leave tokens for the student"
            )
        return self


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

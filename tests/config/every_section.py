"""Recipes that together contain every section, and the numeric fields of those sections."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.load_recipe import AnyRecipe
from stillhouse.config.recipe_values import leaf_types
from stillhouse.language_model.recipe import Recipe
from stillhouse.pruning.pruning_config import TargetRecipe
from stillhouse.section import chosen_model, models_in

Path = tuple[str | int, ...]

API = {"base_url": "http://h/v1", "model": "m", "price": {"input": 1.0, "output": 2.0}}
BUDGET = {"max_usd": 1.0, "max_tokens": 1000}
SAMPLING = {"temperature": 0.7, "top_p": 0.9}
TEXT = {"kind": "text", "path": "a.txt"}
PLAIN: dict[str, Any] = {
    "name": "a",
    "teacher": {"model": "m"},
    "data": {"sources": [TEXT]},
    "student": {"start": "random"},
}
SYNTHESIS: dict[str, Any] = {
    "teacher": {"api": API},
    "prompts": {
        "path": "p.txt",
        "samples": 2,
        "write": {"count": 10},
        "combine": {"templates": ["x"]},
    },
    "sampling": SAMPLING,
    "budget": BUDGET,
    "filters": {
        "decontaminate": {"path": "e.txt"},
        "best_of": {"kind": "majority"},
    },
}
CLASSIFY: dict[str, Any] = {
    "name": "a",
    "task": {"kind": "classify", "labels": ["a", "b"]},
    "teacher": {"model": "m"},
    "data": {"texts": [{"path": "t.csv"}]},
    "student": {"start": "truncated"},
}
GENERATE: dict[str, Any] = {
    "name": "a",
    "task": {"kind": "generate"},
    "teacher": {"model": "m", "vllm": {}, "sampling": SAMPLING},
    "data": {"texts": [{"path": "t.csv"}]},
    "student": {"start": "pretrained", "model": "s"},
    "evaluate": {"judge": {"api": API, "sampling": {}, "budget": BUDGET}},
}


def with_best_of(choice: dict[str, Any], **teacher: Any) -> dict[str, Any]:
    filters = {"best_of": choice}
    synthesis = {**SYNTHESIS, "filters": filters, **({"teacher": teacher} if teacher else {})}
    return {**PLAIN, "synthesize": synthesis}


def recipes() -> list[dict[str, Any]]:
    """Recipes that are copied at each call, so that a test may change them."""
    pruned = {"start": "pruned"}
    judge = {"kind": "judge", "teacher": {"api": API}, "sampling": {}, "budget": BUDGET}
    terms = [
        {"schedule": {"start": 1.0, "end": 0.5}},
        {"divergence": "jsd", "beta": 0.5},
        {"divergence": "alpha_beta", "alpha": 0.5},
        {"divergence": "adaptive_kl", "mu": 0.5},
        {"kind": "hidden_states", "pairs": [[1, 2]]},
        {"kind": "attention_relations", "heads": 2},
        {"kind": "chunks"},
    ]
    served = {"encoding": {"kind": "top_k"}, "server": {"base_url": "http://h", "model": "m"}}
    answers = {**SYNTHESIS, "sampling": {"top_logprobs": 5}}
    local = {**SYNTHESIS, "teacher": {"local": {}}, "budget": {}, "filters": {}}
    kinds = ("threshold", "top_p", "sampled", "stratified", "frozen_head", "hidden")
    hub, file = {"kind": "hub", "dataset": "d"}, {"kind": "jsonl", "path": "a.jsonl"}
    found = [
        {**PLAIN, "train": {}, "quantize": {"qat": {}}, "export": {"push_to_hub": {"repo": "a/b"}}},
        {**PLAIN, "train": {"on_policy": {"prompts": {"path": "p.txt"}, "terms": [{}]}}},
        *({**PLAIN, "train": {"on_policy": {"generator": one}}} for one in ENGINES),
        {**PLAIN, "evaluate": {"lm_eval": {"tasks": ["t"]}}, "objective": {"terms": terms}},
        {**PLAIN, "evaluate": {"own_text": {}}},
        {**PLAIN, "data": {"sources": [{"kind": "corpus"}, hub, file]}, "synthesize": SYNTHESIS},
        with_best_of(judge),
        with_best_of({"kind": "likelihood"}),
        {**PLAIN, "synthesize": local},
        {**PLAIN, "synthesize": {**local, "teacher": {"vllm": {}}}},
        *({**PLAIN, "signals": {"encoding": {"kind": kind}}} for kind in kinds),
        {**PLAIN, "signals": served},
        {**PLAIN, "synthesize": answers, "signals": {"answers": {}}},
        {**PLAIN, "student": {"start": "random", "overrides": {"hidden_size": 64}}},
        {**PLAIN, "student": {"start": "pretrained", "model": "s"}},
        {**PLAIN, "student": {**pruned, "hidden_size": 64, "layers": 2, "search": {}}},
        {**PLAIN, "student": {**pruned, "target": {"params": "60%"}}},
        {**PLAIN, "student": {**pruned, "vocabulary": {"path": "v.txt"}}},
        {
            **PLAIN,
            "student": pruned,
            "cascade": {"hops": [{"name": "h", "layers": 2}], "from_scratch": {"tokens": 2000}},
        },
        {
            **CLASSIFY,
            "train": {},
            "evaluate": {"abstain": {}},
            "export": {"push_to_hub": {"repo": "a/b"}},
        },
        {**CLASSIFY, "student": {"start": "random"}},
        {**CLASSIFY, "student": {"start": "pretrained", "model": "s"}},
        {
            **CLASSIFY,
            "task": {**CLASSIFY["task"], "examples": [{"text": "t", "label": "a"}]},
            "teacher": {"api": API, "sampling": SAMPLING, "budget": BUDGET, "top_logprobs": 5},
            "student": {"start": "truncated", "model": "s"},
        },
        GENERATE,
        {
            **GENERATE,
            "task": {"kind": "extract", "json_schema": "s.json"},
            "teacher": {"model": "m", "sampling": SAMPLING},
            "filters": {},
            "objective": {"terms": [{}]},
            "train": {},
            "evaluate": {},
            "export": {},
        },
        {**GENERATE, "task": {"kind": "generate", "examples": [{"text": "t", "answer": "a"}]}},
        {**PLAIN, "synthesize": {**local, "prompts": {**PROMPT, "examples": [EXAMPLE]}}},
    ]
    return copy.deepcopy(found)


ENGINES: list[dict[str, Any]] = [
    {"kind": "vllm"},
    {"kind": "vllm_server", "base_url": "http://h", "model": "m", "weights": "w"},
]
EXAMPLE = {"prompt": "p", "answer": "a"}
PROMPT = {"path": "p.txt"}


def sections(raw: dict[str, Any]) -> Iterator[tuple[Path, type[BaseModel]]]:
    """Every section of a recipe, and its path."""
    task = raw.get("task", {}).get("kind")
    root = Recipe if task is None else ClassifyRecipe if task == "classify" else AnsweringRecipe
    yield from _sections(raw, root, ())


def _sections(raw: Any, annotation: Any, path: Path) -> Iterator[tuple[Path, type[BaseModel]]]:
    if isinstance(raw, list):
        for index, item in enumerate(raw):
            yield from _sections(item, annotation, (*path, index))
    if not isinstance(raw, dict) or not models_in(annotation):
        return
    model = chosen_model(models_in(annotation), raw)
    if model is None:
        return
    yield path, model
    for name, value in raw.items():
        field = model.model_fields[name]
        yield from _sections(value, field.annotation, (*path, name))


def every_section(annotation: Any = AnyRecipe) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = set()
    waiting = models_in(annotation)
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [m for f in model.model_fields.values() for m in models_in(f.annotation)]
    return found


def is_numeric(annotation: Any) -> bool:
    types_in = {one for one in leaf_types(annotation) if one is not types.NoneType}
    return bool(types_in & {int, float})


def numeric_fields() -> list[tuple[str, dict[str, Any], Path, Any]]:
    """For each numeric field of each section: a name for the test, a recipe, the field's path in
    it, and its type."""
    seen: dict[str, tuple[str, dict[str, Any], Path, Any]] = {}
    for raw in recipes():
        for path, model in sections(raw):
            for name, field in model.model_fields.items():
                if is_numeric(field.annotation):
                    # A target has exactly one key.
                    alone = changed(raw, path, {}) if model is TargetRecipe else raw
                    key = f"{model.__name__}.{name}"
                    seen.setdefault(key, (key, alone, (*path, name), field.annotation))
    return list(seen.values())


def changed(raw: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of a recipe with this value at the path."""
    copied = copy.deepcopy(raw)
    here: Any = copied
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = value
    return copied

"""What requests to an API will cost: an estimate before any is sent, and consent to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.answering.answering_check import known_answers
from stillhouse.answering.answering_config import AnsweringRecipe
from stillhouse.classify.classify_check import known_judgment
from stillhouse.classify.classify_config import ClassifyRecipe
from stillhouse.config.load import load_recipe
from stillhouse.config.members import first_member
from stillhouse.config.recipe import Recipe
from stillhouse.data.data_config import FileSource, Source
from stillhouse.data.documents import Conversation
from stillhouse.data.row_formats import document_from_row
from stillhouse.data.sources import read_sources
from stillhouse.errors import RecipeError
from stillhouse.finding import Finding
from stillhouse.generation.generation_config import ApiTeacher, BudgetRecipe
from stillhouse.generation.vllm_engine import lacks
from stillhouse.runner import run_folder
from stillhouse.stages import synthesis_stage as synthesis
from stillhouse.synthesis.filters_config import JudgeChoice
from stillhouse.synthesis.judge_answers import most_requests
from stillhouse.synthesis.preflight import answered_rows, ask_some, findings, foreseen, told
from stillhouse.synthesis.synthesize import TEXT
from stillhouse.synthesis.synthesize_config import SynthesizeRecipe
from stillhouse.synthesis.synthesized_text import names


def synthesis_findings(recipe: Recipe, base: Path, calls: int) -> Iterator[Finding]:
    """How much is answered, and what the rest costs: by the answers there are, and at most.

    calls: requests that are made first, so that there are answers to tell it from.
    """
    section = recipe.synthesize
    if section is None:
        return
    origins = synthesis.origins(recipe, base)
    ask_some(section, origins, calls, seed=recipe.seed)
    known = foreseen(section, origins, seed=recipe.seed)
    yield from findings(known, section, origins, "synthesis")
    if known.missing and section.teacher.vllm is not None:
        for level, text, fix in lacks(section.teacher.vllm, base):
            yield Finding(level, "vLLM", text, fix)
    if verdicts := most_requests(section, known.requests):
        yield Finding("estimate", "judge", f"at most {verdicts:,} verdicts are asked for")
    if not synthesis.wanted(recipe, base):
        text = f"no source of data names {section.out}: `stillhouse run` synthesizes nothing"
        fix = f"add {{kind: jsonl, path: {section.out}}} to data.sources, if it is to"
        yield Finding("warning", "synthesis", text, fix)


# --- the text that is to come ----------------------------------------------------------------


@dataclass(frozen=True)
class ComingText:
    """documents: some rows of the text, made of the answers there are. times: how many times as
    much there will be, filters aside. other_sources: those of `data` that read something else."""

    documents: list[Conversation]
    times: float
    other_sources: list[Source]


def coming_text(recipe: Recipe, base: Path, most: int) -> ComingText | None:
    """None where `data` reads no synthesized text."""
    section = recipe.synthesize
    if section is None or not synthesis.wanted(recipe, base):
        return None
    out = synthesis.out_path(section, base)
    others = [source for source in recipe.data.sources if not names(source, out, base)]
    plan = synthesis.synthesis(recipe, base)
    stage = run_folder(recipe).finished(plan.name, plan.depends_on)
    if stage is not None:
        path = str((stage.path / TEXT).absolute())
        source = FileSource(kind="jsonl", path=path, limit=most)
        documents = [d for d in read_sources([source], base) if isinstance(d, Conversation)]
        return ComingText(documents, stage.summary["kept"] / max(1, len(documents)), others)
    origins = synthesis.origins(recipe, base)
    rows = answered_rows(section, origins, most, seed=recipe.seed)
    made = [
        {"messages": [*row.messages, {"role": "assistant", "content": row.text}]}
        for row in rows
        if row.text
    ]
    read = (document_from_row(row, "text", "the journal") for row in made)
    documents = [document for document in read if isinstance(document, Conversation)]
    known = foreseen(section, origins, seed=recipe.seed)
    return ComingText(documents, known.requests / max(1, len(documents)), others)


# --- consent ---------------------------------------------------------------------------------


def agree_to_spend(
    path: Path,
    overrides: Sequence[str],
    *,
    command: Literal["run", "synthesize"],
    confirm: Callable[[str], bool] | None,
) -> bool:
    """Asks for consent before an API is paid without a budget; True if the command may go on.

    A budget is consent up to its limit. No consent is needed where no answer is missing, or where
    the server needs no key and has no price: nobody is paid.
    confirm: shows a question and returns the answer; None without a terminal.
    Raises RecipeError if consent is needed and `confirm` is None.
    """
    recipe, base = first_member(load_recipe(path, overrides)), path.parent
    section = recipe.synthesize
    if section is None or (command == "run" and not synthesis.wanted(recipe, base)):
        return True
    plan = synthesis.synthesis(recipe, base)
    finished = run_folder(recipe).finished(plan.name, plan.depends_on)
    if finished is not None and (command == "run" or not synthesis.lacks(finished)):
        return True
    unlimited = _unlimited(recipe, section, base)
    if not unlimited:
        return True
    if confirm is None:
        raise RecipeError(
            f"this would pay an API without a limit: {unlimited}",
            where="synthesize.budget",
            fix="set max_usd or max_tokens there, or give --yes to spend without a limit",
        )
    return confirm(f"{unlimited}. There is no budget. Send the requests?")


def agree_to_task(
    recipe: ClassifyRecipe | AnsweringRecipe, base: Path, confirm: Callable[[str], bool] | None
) -> bool:
    """As `agree_to_spend`, of a task's teacher and judge."""
    teacher, unlimited = recipe.teacher, []
    if _may_cost(teacher.api, teacher.budget):
        if isinstance(recipe, ClassifyRecipe):
            known = known_judgment(recipe, base)
        else:
            known = known_answers(recipe, base)
        if known.missing:
            cost = f", ${known.worst.usd:,.2f}" if teacher.api and teacher.api.price else ""
            unlimited.append(
                f"{known.missing:,} requests take at most {known.worst.tokens:,} tokens{cost}"
            )
    choice = recipe.filters.best_of if isinstance(recipe, AnsweringRecipe) else None
    if isinstance(choice, JudgeChoice) and _may_cost(choice.teacher.api, choice.budget):
        unlimited.append("the judge chooses among the answers to each training text")
    judge = recipe.evaluate.judge if isinstance(recipe, AnsweringRecipe) else None
    if judge is not None and _may_cost(judge.api, judge.budget):
        unlimited.append("the judge compares the answers to all test texts")
    if not unlimited:
        return True
    if confirm is None:
        raise RecipeError(
            f"this would pay an API without a limit: {'; '.join(unlimited)}",
            where="budget",
            fix="set teacher.budget (and that of evaluate.judge or filters.best_of), or give --yes "
            "to spend without a limit",
        )
    return confirm(f"{'; '.join(unlimited)}. There is no budget. Send the requests?")


def _unlimited(recipe: Recipe, section: SynthesizeRecipe, base: Path) -> str:
    """What may be paid without a budget, in words; nothing where nothing may."""
    choice = section.filters.best_of
    judge = choice if isinstance(choice, JudgeChoice) else None
    teacher_costs = _may_cost(section.teacher.api, section.budget)
    judge_costs = judge is not None and _may_cost(judge.teacher.api, judge.budget)
    if not teacher_costs and not judge_costs:
        return ""
    known = foreseen(section, synthesis.origins(recipe, base), seed=recipe.seed)
    parts = []
    if teacher_costs and known.missing:
        parts.append(told(known, section))
    if judge_costs:
        parts.append(f"the judge gets at most {most_requests(section, known.requests):,} requests")
    return "; ".join(parts)


def _may_cost(api: ApiTeacher | None, budget: BudgetRecipe) -> bool:
    if api is None or budget.max_usd is not None or budget.max_tokens is not None:
        return False
    if api.price is None:
        return api.key_env is not None
    return api.price.input > 0 or api.price.output > 0

"""A classifier's model card: what it is, how good, and how to use it."""

from __future__ import annotations

from pathlib import Path

from stillhouse.evaluate.classification import ClassificationEvaluation
from stillhouse.recipe import ClassifyRecipe, recipe_yaml
from stillhouse.report.classifier import abstention_sentence, measures
from stillhouse.report.palette import role_name
from stillhouse.runfolder import write_atomically
from stillhouse.tasks.classifier import Facts

_POOLED = (
    "",
    "The head reads the mean of the last hidden states. The `forward` of transformers' own class "
    "would read the last token alone: use Stillhouse, or `model.score(mean)` yourself.",
)


def write_card(
    folder: Path, recipe: ClassifyRecipe, teacher: str, found: ClassificationEvaluation
) -> None:
    names = [role_name(result.role) for result in found.results]
    table = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in measures(found)]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags: [stillhouse, distillation]",
        "---",
        f"# {recipe.name}",
        "",
        f"A classifier of {len(found.labels)} labels, distilled from {teacher} with Stillhouse.",
        f"Labels: {', '.join(found.labels)}.",
        "",
        f"On {found.texts:,} test texts:",
        "",
        *table,
        "",
        abstention_sentence(found.abstention),
        "",
        "`stillhouse predict FOLDER texts.jsonl` writes a label, probabilities and whether to "
        "abstain for each text.",
        *(_POOLED if Facts.load(folder).mean_pooling else ()),
        "",
        "<details><summary>Recipe</summary>",
        "",
        "```yaml",
        recipe_yaml(recipe).rstrip(),
        "```",
        "</details>",
        "",
    ]
    write_atomically(folder / "README.md", "\n".join(lines))

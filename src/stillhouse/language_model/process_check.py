"""Whether the processes of this torchrun can train a student, as early as that can be known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from stillhouse.data.data_config import CorpusSource, DataRecipe, TextSource
from stillhouse.data.packing import most_windows
from stillhouse.language_model.data_stage import open_data
from stillhouse.language_model.job import Job
from stillhouse.language_model.run_models import RunModels
from stillhouse.language_model.training_memory import with_shard
from stillhouse.launch import world_size
from stillhouse.pipeline.engine import has_finished
from stillhouse.processes import require_blocks, shards_in_node
from stillhouse.runfolder import NamedRecipe, Stage
from stillhouse.teachers.planned_model import planned_model
from stillhouse.teachers.sharded_teacher import require_plan
from stillhouse.training.train import plan_batches, require_windows
from stillhouse.training.train_config import TrainRecipe


def require_processes(models: RunModels) -> None:
    """Raise RecipeError for a batch that they cannot divide, training text of less than a window
    for each, nodes with different numbers of them, and a student that cannot be sharded; ModelError
    for such a teacher."""
    train, processes = models.recipe.train, world_size()
    plan_batches(train, train.batch_size, processes)
    if processes > 1 and not train.only_own_text:
        require_tokens(models.recipe.data, models.recipe.data.train_tokens, processes)
    if processes == 1 or train.shard == "none":
        return
    shards_in_node(train.shard_within == "node")
    if train.shard in ("student", "both"):
        require_blocks(planned_model(models.student))
    if train.shard in ("teacher", "both"):
        for config in (models.teacher, *models.teachers):
            require_plan(config, "teacher")


class _Training(NamedRecipe, Protocol):
    """The recipe of a run that trains a student."""

    @property
    def train(self) -> TrainRecipe: ...


def require_tokens(section: DataRecipe, tokens: int | None, processes: int) -> None:
    """Raise RecipeError if so many training tokens cannot fill a window for each process."""
    if tokens is None:
        return
    texts = all(isinstance(source, CorpusSource | TextSource) for source in section.sources)
    packed = section.packing == "isolated"
    most = most_windows(tokens, section.context, packed=packed, splittable=texts)
    require_windows(most, processes, at_most=True)


def ready_to_train(job: Job, stages: Mapping[str, Stage], *_: object) -> Job:
    """`with_shard`, once the data exist. Raises RecipeError as `require_text_for_all`."""
    require_text_for_all(job.recipe, stages["data"])
    return with_shard(job)


def require_text_for_all(recipe: _Training, data: Stage) -> None:
    """Raise RecipeError if a training is still to run and has more processes than windows."""
    processes = world_size()
    if processes > 1 and not recipe.train.only_own_text and not has_finished(recipe, "train"):
        require_windows(len(open_data(data)[0]), processes)

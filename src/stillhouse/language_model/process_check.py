"""Whether the processes of this torchrun can train a student, before anything is computed."""

from __future__ import annotations

from stillhouse.language_model.run_models import RunModels
from stillhouse.launch import world_size
from stillhouse.processes import require_blocks, shards_in_node
from stillhouse.teachers.planned_model import planned_model
from stillhouse.teachers.sharded_teacher import require_plan
from stillhouse.training.train import plan_batches


def require_processes(models: RunModels) -> None:
    """Raise RecipeError for a batch that they cannot divide, nodes with different numbers of them,
    and a student that cannot be sharded; ModelError for such a teacher."""
    train, processes = models.recipe.train, world_size()
    plan_batches(train, train.batch_size, processes)
    if processes == 1 or train.shard == "none":
        return
    shards_in_node(train.shard_within == "node")
    if train.shard in ("student", "both"):
        require_blocks(planned_model(models.student))
    if train.shard in ("teacher", "both"):
        for config in (models.teacher, *models.teachers):
            require_plan(config, "teacher")

"""Checks `train.on_policy` before the run: stop tokens, templates, prompts, and resources."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.account import forward_flops
from stillhouse.attention_heads import head_size, key_value_heads
from stillhouse.errors import SignalError
from stillhouse.finding import Finding
from stillhouse.generation.kv_cache import GROWTH
from stillhouse.generation.rollout_config import VllmRollouts, VllmServerRollouts
from stillhouse.generation.vllm_engine import ROLLOUTS, lacks
from stillhouse.generation.vllm_rollouts import require_no_other_model
from stillhouse.language_model.job import Job
from stillhouse.language_model.run_models import RunModels
from stillhouse.language_model.train_stage import own_prompts
from stillhouse.number_format import count, seconds, size
from stillhouse.planning.machine import Machine
from stillhouse.planning.model_size import config_size
from stillhouse.teachers.load_model import load_tokenizer
from stillhouse.training.own_prompts import OwnPrompts, require_room
from stillhouse.training.train import plan_batches
from stillhouse.training.turn_agreement import differing_template, require_same_end

TOPIC = "on-policy"
DECODING = 3.0
"""Assumed cost of a generated token, as a multiple of the time that its FLOPs would take in a
training step: generation reads all weights for each batch of tokens."""


def require_on_policy(job: Job) -> Iterator[Finding]:
    """Check on-policy training; yields warnings.

    Raises ModelError, DataError, or SignalError if the student cannot generate with these models,
    prompts, or signals, and RunError if the folder for weights contains a different model.
    """
    section = job.recipe.train.on_policy
    if section is None:
        return
    student = load_tokenizer(job.tokenizer)
    prompts = own_prompts(job, student)  # reads and checks them whatever the share
    if section.share == 0:
        return
    if isinstance(section.generator, VllmRollouts):
        for level, text, fix in lacks(section.generator, job.base, key=ROLLOUTS):
            yield Finding(level, "vLLM", text, fix)
    if isinstance(section.generator, VllmServerRollouts):
        require_no_other_model(section.generator.folder(job.base))
    signals = job.recipe.signals
    if signals is not None and signals.store is not None and signals.missing != "live":
        raise SignalError(
            "a signal store cannot score text that the student generates during training",
            where=job.base / signals.store,
            fix="set signals.missing: live, so that the teacher scores that text; or remove "
            "`signals` or train.on_policy",
        )
    for source in job.teachers:
        teacher = load_tokenizer(source)
        require_same_end(student, teacher)
        if source in job.other_teachers:
            continue
        difference = differing_template(student, teacher)
        if difference is not None:
            fix = "copy the teacher's chat_template.jinja into the student's folder"
            yield Finding("warning", TOPIC, f"{source.described}: {difference}", fix)
    if prompts is None:
        return
    context = job.recipe.data.context
    require_room(prompts, context)
    short = int((prompts.lengths > context - section.max_tokens).sum())
    if short:
        text = (
            f"{short:,} of {len(prompts):,} prompts leave fewer than max_tokens "
            f"({section.max_tokens}) of the {context:,} tokens of context: their answers end early"
        )
        yield Finding("warning", TOPIC, text, "raise data.context, or lower max_tokens")


def own_text_findings(
    models: RunModels, machine: Machine, windows: int, prompts: OwnPrompts | None
) -> Iterator[Finding]:
    """Report the most that the student generates during training, and its time and memory.

    windows: the number of windows of data. prompts: None if unknown; each prompt is then assumed to
    fill half of the context that an answer leaves, and to be at most as long as an answer.
    """
    settings, context = models.recipe.train, models.recipe.data.context
    section = settings.on_policy
    if section is None or section.share == 0:
        return
    steps = plan_batches(settings, windows, machine.processes).steps
    cold = min(steps, -(-section.cold_start_tokens // (settings.batch_size * context)))
    own = round((steps - cold) * settings.batch_size * section.share)
    most = min(section.max_tokens, context - 1)
    length = max(1, min(most, (context - most) // 2))
    if prompts is not None:
        length = min(context - 1, round(float(prompts.lengths.mean())))
    answers = own * max(1, context // (length + min(most, context - length)))
    active = config_size(models.student).active
    flops = DECODING * forward_flops(active, answers * most)
    flops += forward_flops(active, answers * length)
    text = f"the student generates {count(answers)} answers, at most {count(answers * most)} tokens"
    if machine.rate is not None:
        text += f", about {seconds(flops / (machine.rate * machine.processes))}"
    cache = kv_cache_bytes(models, machine, prompts)
    text += f"; its KV cache takes {size(cache)} per process"
    yield Finding("estimate", TOPIC, text)


def kv_cache_bytes(models: RunModels, machine: Machine, prompts: OwnPrompts | None) -> float:
    """The maximum size of the KV cache in bytes while the student generates."""
    section, longest = models.recipe.train.on_policy, models.recipe.data.context
    assert section is not None
    if prompts is not None:
        longest = min(longest, int(prompts.lengths.max()) + section.max_tokens)
    config = models.student.get_text_config()
    places = -(-longest // GROWTH) * GROWTH
    row = 2 * config.num_hidden_layers * key_value_heads(config) * head_size(config)
    values = row * places * section.batch
    return float(values * machine.compute(models.recipe.train.products).itemsize)

"""On-policy distillation: part of each optimizer step's rows is text that the student generates.

Rollouts are generated for a window of optimizer steps at a time, before its first step. They are
then treated as fixed text, so a step on them is an ordinary one. A resumed run finds them in a
folder that is either complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from stillhouse.data.batches import Batch, Batches
from stillhouse.data.turn_end import end_of_answers
from stillhouse.errors import SignalError, TrainingError
from stillhouse.generation.generator import Continuation
from stillhouse.generation.local_generator import LocalGenerator
from stillhouse.generation.own_text import FAR
from stillhouse.generation.vllm_rollouts import OpenGenerator
from stillhouse.launch import leads
from stillhouse.objectives.objective_config import ObjectiveRecipe
from stillhouse.processes import with_gathered
from stillhouse.progress import note
from stillhouse.students.student import Student
from stillhouse.teachers.local_teacher import LocalTeacher
from stillhouse.teachers.teacher import Teacher, TeacherNeeds
from stillhouse.training.distillation import Distillation
from stillhouse.training.draw_rollouts import able_to_generate, slot_request, write_answers
from stillhouse.training.measures import measure_heldout, measure_rollouts
from stillhouse.training.objective import Objective, objective_for
from stillhouse.training.own_prompts import (
    OwnPrompts,
    prompts_of_windows,
    require_room,
    require_tokens,
)
from stillhouse.training.rollouts import (
    OwnBatch,
    Rollout,
    forget_rollouts,
    read_rollouts,
    rollout_batch,
    save_rollouts,
    window_folder,
)
from stillhouse.training.step_rows import Micro, Slot, StepRows
from stillhouse.training.train_config import OnPolicyRecipe
from stillhouse.training.turn_agreement import require_same_end

MOSTLY = 0.5
"""Share of truncated answers above which a warning is printed."""
WHERE = "train.on_policy"


@runtime_checkable
class ShipsOtherWeights(Protocol):
    """A callback for a student that is deployed with different weights than the trained ones, such
    as quantized weights."""

    def as_shipped(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the block, give the model the weights with which it will be deployed."""
        ...


class OnPolicy:
    """The text that a student generates during a training run.

    prompts: None: the chats in `batches`. batch: rows of a step. steps: of the training run.
    generator: opens a generator for the student. folder: the training run's; None keeps rollouts in
    memory. Raises DataError as `prompts_of_windows` and `require_room` do.
    """

    def __init__(
        self,
        section: OnPolicyRecipe,
        prompts: OwnPrompts | None,
        batches: Batches,
        *,
        batch: int,
        steps: int,
        micro: Micro,
        generator: OpenGenerator,
        seed: int,
        folder: Path | None,
    ) -> None:
        prompts = prompts_of_windows(batches) if prompts is None else prompts
        require_room(prompts, batches.context)
        cold = 0
        if section.cold_start_tokens:
            a_step = batch * batches.supervised_tokens / max(1, len(batches))
            cold = min(steps, math.ceil(section.cold_start_tokens / max(a_step, 1.0)))
        self.plan = plan = StepRows(
            batch=batch,
            share=section.share,
            cold_steps=cold,
            rows=len(batches),
            lengths=prompts.lengths.tolist(),
            samples=section.samples,
            max_tokens=section.max_tokens,
            context=batches.context,
            seed=seed,
        )
        self.section, self.prompts, self.micro = section, prompts, micro
        self.steps, self.generator, self.folder = steps, generator, folder
        self._window: int | None = None
        self._rollouts: dict[int, Rollout] = {}
        self._warned = False
        settings = section.model_dump(mode="json", exclude={"prompts", "batch", "generator"})
        settings["generator"] = section.generator.kind
        found = [settings, prompts.fingerprint, seed, batch, plan.context, cold]
        self.identity = hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def prepare(self, student: Student, teacher: Teacher | None) -> None:
        """Build the objective for the student's text, and find the teacher that scores it.

        Raises SignalError: a teacher that cannot score it, or not for these divergences.
        DataError as `require_tokens` does. ModelError as `Teacher.prepare` and `require_same_end`
        do.
        """
        if teacher is None:
            raise SignalError(
                "there is no teacher to score the text that the student generates",
                where=WHERE,
                fix="give a teacher, or remove on_policy",
            )
        recipe = ObjectiveRecipe(terms=list(self.section.terms))
        self.objective: Objective = objective_for(recipe, student.model.config, teacher.config)
        self.teacher = teacher.for_own_text()
        require_same_end(student.tokenizer, self.teacher.tokenizer)
        self.teacher.prepare(TeacherNeeds(self.objective.needs.terms, tokenizer=student.tokenizer))
        if self.section.teacher_tokens and not (
            isinstance(self.teacher, LocalTeacher) and not self.teacher.collective
        ):
            raise SignalError(
                f"{self.teacher.described} cannot generate the beginning of answers",
                where=f"{WHERE}.teacher_tokens",
                fix="set teacher_tokens to 0, or use one local teacher that is not sharded",
            )
        require_tokens(self.prompts, student.vocabulary)
        self.ends = ends_of(student)
        tokenizer = student.tokenizer
        pad = None if tokenizer is None else tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else min(self.ends, default=0))

    # --- the rows of a step ----------------------------------------------------------------------

    def place(self, step: int, batches: list[Batch]) -> int:
        """Put this process's rollouts into the micro-batches of a step whose window is loaded.

        Returns the number of supervised tokens in the rollouts of all processes.
        """
        windows = [
            [self._rollouts[slot.number] for slot in window if slot.number in self._rollouts]
            for window in self.plan.own_windows(step)
        ]
        longest = max((sum(len(one.ids) for one in window) for window in windows), default=0)
        # Equal on all processes, since they score with a sharded teacher together.
        width = min(self.plan.context, max(8, -(-longest // 8) * 8))
        drop = self.section.cut_off == "drop"
        first = self.micro.batches(self.plan.batch - len(windows))
        for number in range(first, len(batches)):
            own = self.micro.part(windows, number - first)
            batches[number] = rollout_batch(own, width, self.pad_id, drop_cut_off=drop)
        return sum(
            len(one.own) for window in windows for one in window if not (drop and one.cut_off)
        )

    # --- windows of steps ------------------------------------------------------------------------

    def window_start(self, step: int) -> int | None:
        """The first step of the window that contains this step; None in the cold start."""
        after = step - self.plan.cold_steps
        return None if after < 0 else step - after % self.section.window

    def load(self, step: int) -> bool:
        """Read a step's rollouts from the folder, where a killed process may have left them.

        Returns whether they were there.
        """
        start = self.window_start(step)
        if self.folder is None or start is None:
            return False
        found = read_rollouts(window_folder(self.folder, start), self.identity)
        if found is None:
            return False
        self._hold(start, found)
        return True

    def require(self, step: int) -> None:
        """Raise TrainingError if training cannot resume at this step, since its window has already
        begun and the window's rollouts are lost."""
        if self.window_start(step) not in (None, step) and not self.load(step):
            raise TrainingError(f"the rollouts of step {step} are missing or damaged")

    def begin(
        self,
        step: int,
        module: Distillation,
        callbacks: Sequence[Any],
        accelerator: Accelerator,
        *,
        sharded: bool,
    ) -> dict[str, float] | None:
        """Generate the rollouts of a step's window, unless they already exist. Every process must
        call this before each step.

        Returns a row of metrics if the window begins with this step.
        """
        if self.window_start(step) in (None, self._window):
            return None
        speed: dict[str, float] = {}
        lacking = torch.tensor(float(not self.load(step)), device=accelerator.device)
        if float(accelerator.reduce(lacking)) > 0:
            with ExitStack() as opened:
                for callback in callbacks:
                    if isinstance(callback, ShipsOtherWeights):
                        opened.enter_context(callback.as_shipped(module))
                draw = partial(self.draw, step, module.student)
                speed = with_gathered(module, draw) if sharded else draw()
            accelerator.wait_for_everyone()
        begins = self.window_start(step) == step
        return {"step": step, **self.measured(), **speed} if begins else None

    def draw(self, step: int, student: Any) -> dict[str, float]:
        """Generate the rollouts of the window that begins at this step. Every process must call
        this, and generates its share.

        student: the model, with complete (not sharded) weights. Returns the speed.
        """
        began = time.monotonic()
        end = min(step + self.section.window, self.steps)
        slots = self.plan.slots(step, end)[self.micro.process :: self.micro.processes]
        prompts = [self.prompts[slot.prompt] for slot in slots]
        begun, seed = self._begun(slots, prompts), self.plan.seed
        with self.generator(student, self.ends) as generator:
            own = write_answers(generator, slots, prompts, self.section, seed, begun=begun)
        found = sorted(gather_object(own), key=lambda rollout: rollout.slot)
        seconds = time.monotonic() - began
        if self.folder is not None and leads():
            save_rollouts(window_folder(self.folder, step), found, self.identity)
        self._hold(step, found)
        return {"own_tokens_per_s": sum(len(one.own) for one in found) / max(seconds, 1e-9)}

    def measured(self) -> dict[str, float]:
        """Compute the metrics of the window's rollouts, and warn once if most are truncated."""
        found = measure_rollouts(list(self._rollouts.values()))
        share = found["own_cut_off"]
        if share > MOSTLY and not self._warned and leads():
            self._warned = True
            lost = ", and nothing is learned from them" if self.section.cut_off == "drop" else ""
            note(
                f"warning: {share:.0%} of the student's answers reach {WHERE}.max_tokens "
                f"({self.section.max_tokens}) without an end token{lost}: raise it, or let the "
                f"student learn to stop from data first ({WHERE}.cold_start_tokens)"
            )
        return found

    def compare_kinds(
        self, model: nn.Module, batches: Sequence[Batch], accelerator: Accelerator
    ) -> None:
        """Warn if the student is much farther from its teacher on its own text than on the data.

        Every process must call this, before the first step on own text.
        model: a `Distillation` in eval mode, or a wrapper of one. batches: of the step.
        """
        kinds = [
            [one for one in batches if isinstance(one, OwnBatch) is written]
            for written in (False, True)
        ]
        if not all(kinds):
            return
        found = []
        for kind in kinds:
            here = [{k: each.to(accelerator.device) for k, each in one.items()} for one in kind]
            found.append(measure_heldout(model, self.teacher, here, accelerator)["heldout_kl"])
        data, own = found
        if own > FAR * data and leads():
            note(
                f"warning: the student's KL to the teacher is {own:.3g} nats/token on its own "
                f"text, {own / max(data, 1e-9):.1f} times the KL on the data ({data:.3g}): let it "
                f"learn from data first ({WHERE}.cold_start_tokens), for example for a fifth of "
                "the training"
            )

    def forget(self, before: int) -> None:
        """Delete rollouts that are not needed to resume at this step or later."""
        start = self.window_start(before)
        if self.folder is not None and start is not None:
            forget_rollouts(self.folder, start)

    @property
    def processed_tokens(self) -> int:
        """Number of tokens that the student read and generated for the loaded window."""
        return sum(len(one.ids) for one in self._rollouts.values())

    def _hold(self, start: int, rollouts: Sequence[Rollout]) -> None:
        self._window = start
        self._rollouts = {rollout.slot: rollout for rollout in rollouts}

    def _begun(self, slots: Sequence[Slot], prompts: Sequence[Sequence[int]]) -> list[Continuation]:
        """Generate the beginning of each answer with the teacher, if it should."""
        most = self.section.teacher_tokens
        if not most:
            return []
        assert isinstance(self.teacher, LocalTeacher)
        requests = [
            slot_request(slot, prompt, self.section, self.plan.seed, most=most)
            for slot, prompt in zip(slots, prompts, strict=True)
        ]
        with able_to_generate(self.teacher.model):
            local = LocalGenerator(
                self.teacher.model, self.ends, batch=self.section.batch, pack=False
            )
            found = dict(local.generate(requests))
        return [found[number] for number in range(len(requests))]


def ends_of(student: Student) -> frozenset[int]:
    """The ids at which the student's answers end."""
    config = student.model.generation_config
    if student.tokenizer is not None:
        return end_of_answers(student.tokenizer, config)
    listed = config.eos_token_id
    ids = listed if isinstance(listed, list | tuple) else [listed]
    return frozenset(int(one) for one in ids if one is not None)

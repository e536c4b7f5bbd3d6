"""A student pruned from a larger model. The training text decides which parts are removed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.account import CountedFlops, count_parameters
from stillhouse.data.windows import WindowSet
from stillhouse.errors import RecipeError
from stillhouse.hardware import choose_precision, default_device, free_memory_bytes
from stillhouse.progress import note
from stillhouse.pruning.calibrate import unseen
from stillhouse.pruning.kept_tokens import prune_tokenizer
from stillhouse.pruning.layer_streaming import stream_layers
from stillhouse.pruning.offload import released_after_use
from stillhouse.pruning.prune import prune_model
from stillhouse.pruning.pruning_config import VocabularyFile
from stillhouse.pruning.reference import Domain, mean_kl, read_text
from stillhouse.pruning.shapes import planned_shape, sizes_to_prune
from stillhouse.pruning.sizes import Sizes, check_sizes, sizes_of
from stillhouse.pruning.vocabulary_cut import expected_tokens, kept_token_ids
from stillhouse.shared_work import ALONE, Processes
from stillhouse.students.student_config import PrunedStudent
from stillhouse.teachers.activations import decoder_layers
from stillhouse.teachers.backbone import lm_head

Summary = dict[str, Any]

STREAMS = 16
"""Memory that cutting a layer needs, in copies of the calibration rows' residual stream: two
streams in a few places, and the FFN's activations."""

MOMENTS = 4
"""Number of matrices as large as an FFN's second moments that are in memory at once: the sum and
the terms added to it, or the sum, its inverse, and the matrices that both are computed from."""

CUT_LAYER = 2
"""Copies of a layer's weights while it is cut: the original and the cut ones."""

TRAINED_LAYER = 4
"""Further copies while a layer is trained: gradients, two moments, and the old weights."""

WIDE = 4
"""Bytes per parameter in float32."""

SERVED_BYTES = 2
"""Bytes per parameter (bfloat16), for a target in bytes."""


def prune_to(
    section: PrunedStudent,
    model: Any,
    tokenizer: Any,
    windows: WindowSet,
    heldout: WindowSet | None = None,
    *,
    seed: int = 0,
    base: Path = Path(),
    processes: Processes = ALONE,
) -> tuple[Any, Summary, tuple[int, ...] | None]:
    """Prune a float32 model in place to the sizes in `section`, calibrated on training windows.

    Returns its tokenizer, a summary, and the original ids of the kept tokens (None: all). The
    summary is plain data for JSON: `pruning` (see PruneReport), notes, the original parameters, and
    FLOPs.

    heldout: compared with the training text; a note warns if the domains differ, with the measured
    KL. base: the folder that paths in the section are relative to. processes: as in `prune_model`;
    the summary is the main process's.
    Raises RecipeError: sizes that the model cannot have, or a target instead of sizes.
    """
    before = count_parameters(model)
    if section.target is not None:
        raise RecipeError(
            "pruning needs sizes, and this student has a target instead",
            where="student.target",
            fix="search for the sizes first (search.search_shape), as `stillhouse run` does",
        )
    explicit_sizes(section, model.config)
    own_tokens = -(-section.calibration_tokens // processes.count)
    device, by_layer = placement(section, model, own_tokens, processes)
    precision = choose_precision("auto", device)
    if processes.leads:
        where = f"{device}, a layer at a time," if by_layer else f"{device}"
        note(f"Pruning on {where} with matrix products in {precision.reason}")
    dtype, calibration = precision.dtype, section.calibration_tokens
    with CountedFlops() as counted, ExitStack() as stack:
        if by_layer:
            stack.callback(stream_layers(model, device))
        else:
            model.to(device)
        kept_ids, named = None, section.vocabulary
        if named is not None:
            kept_ids = kept_token_ids(
                tokenizer,
                windows,
                base / named.path if isinstance(named, VocabularyFile) else named,
                configs=(model.config, model.generation_config),
                expect=lambda: expected_tokens(model, windows, calibration, seed, dtype, processes),
            )
            tokenizer = prune_tokenizer(tokenizer, kept_ids)
        rest = unseen(windows, calibration, seed) if len(windows) else windows
        texts = []
        if heldout is not None and processes.leads:
            texts = [rest if len(rest) else windows, heldout]
        with released_after_use(model):
            read = [read_text(model, text, seed, dtype) for text in texts]
        # The head that was used keeps its pages in memory, so the references get the released one.
        head = lm_head(model)
        read = [(replace(reference, head=head), perplexity) for reference, perplexity in read]
        report = prune_model(
            model,
            windows,
            hidden_method=section.hidden_method,
            kept_ids=kept_ids,
            reconstruct=section.refit,
            calibration_tokens=calibration,
            seed=seed,
            dtype=dtype,
            method=section,
            local_tokens=section.local_distillation or 0,
            processes=processes,
            **section.sizes,
        )
        summary: Summary = {"pruning": asdict(report), "notes": list(report.notes)}
        if read:
            (like, own_perplexity), (unlike, heldout_perplexity) = read
            kl = own = None
            if kept_ids is None:
                with released_after_use(model):
                    kl = mean_kl(unlike, model, dtype)
                    own = mean_kl(like, model, dtype) if len(rest) else None
            domain = Domain(own_perplexity, heldout_perplexity, kl, own)
            summary["domain"] = asdict(domain)
            if warning := domain.warning():
                note(f"warning: {warning}")
                summary["notes"].append(warning)
    model.to("cpu")
    flops = sum(processes.collect(counted.flops))
    summary |= {"teacher_parameters": asdict(before), "flops": flops}
    return tokenizer, summary, kept_ids


def moment_bytes(config: Any) -> int:
    """The memory for the second moments of an FFN's activations."""
    return int(WIDE * MOMENTS * sizes_of(config).ffn_size ** 2)


def layers_on_device(section: PrunedStudent) -> int | None:
    """How many copies of a layer's weights are on a GPU while only this layer is there and is cut;
    None if all layers must be there."""
    if "gradients" in (section.importance, section.depth_importance):
        return None  # a backward pass reads the weights of all layers
    return CUT_LAYER if section.local_distillation is None else CUT_LAYER + TRAINED_LAYER


def placement(
    section: PrunedStudent, model: Any, tokens: int, processes: Processes = ALONE
) -> tuple[torch.device, bool]:
    """Choose where to prune a model, and whether to copy its layers there one at a time.

    GPUs are used if the required memory is free on all of them, otherwise the CPU.
    tokens: calibration tokens per process.
    """
    device = default_device()
    if device.type == "cpu":
        return device, False
    layers = [sum(weight.numel() for weight in one.parameters()) for one in decoder_layers(model)]
    total = sum(weight.numel() for weight in model.parameters())
    work = WIDE * STREAMS * tokens * model.config.hidden_size + moment_bytes(model.config)
    free = min(processes.collect(free_memory_bytes(device)))
    if WIDE * total + work <= free:
        return device, False
    copies, needed = layers_on_device(section), WIDE * total + work
    if copies is not None:
        needed = WIDE * (total - sum(layers) + copies * max(layers)) + work
        if needed <= free:
            return device, True
    note(f"{free / 2**30:.1f} GiB are free on {device}, but pruning needs {needed / 2**30:.1f} GiB")
    return torch.device("cpu"), False


def placed(model: Any, section: PrunedStudent, device: torch.device) -> Any:
    """Place a model for the search on the device. Its layers stay on the host if they do not all
    fit there."""
    tokens = min(section.search.calibration_tokens, section.calibration_tokens)
    if placement(section, model, tokens)[1]:
        stream_layers(model, device)
        return model
    return model.to(device)


def require_no_recipe_keys(section: PrunedStudent, where: str) -> None:
    """Raise RecipeError for options that only a recipe supports. where: the function that was
    called."""
    if section.vocabulary is not None or section.model is not None:
        raise RecipeError(
            "vocabulary and model are supported only in recipes",
            where=where,
            fix="leave them out, or use stillhouse.run",
        )


def target_sizes(section: PrunedStudent, config: Any) -> dict[str, int]:
    """Sizes of the shape that meets the section's target with the fewest cuts.

    config: of the model that is pruned.
    Raises RecipeError: a target that can only be checked by measuring shapes, or that no shape
    meets.
    """
    assert section.target is not None
    if section.target.measured:
        raise RecipeError(
            f"{section.target.key} can only be checked by measuring shapes",
            where=f"target.{section.target.key}",
            fix="search for the shape with stillhouse.search_sizes, or with student.target in a "
            "recipe",
        )
    planned = planned_shape(config, section.search, section.target, width=SERVED_BYTES)
    return sizes_to_prune(sizes_of(config), planned)


def explicit_sizes(section: PrunedStudent, config: Any, *, owner: str | None = None) -> Sizes:
    """The sizes of a student without a target.

    All tokens are counted if the text or a file decides which are kept. config: of the pruned
    model. owner: its name in error messages; None: as in the section.
    Raises RecipeError if the sizes are impossible.
    """
    # Known without the text; the number of tokens is not.
    vocabulary = section.vocabulary if isinstance(section.vocabulary, int) else None
    return check_sizes(
        config,
        {**section.sizes, "vocabulary": vocabulary},
        hidden_method=section.hidden_method,
        text_decides=vocabulary is None and section.vocabulary is not None,
        owner=owner or ("the teacher" if section.model is None else "the model that is pruned"),
    )

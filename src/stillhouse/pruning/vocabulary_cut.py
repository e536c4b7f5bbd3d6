"""Choose which tokens a student keeps: those that its text needs, and those that any text needs.

A student with fewer tokens renumbers them. `kept_ids[new] = old` maps its ids to the teacher's. The
teacher's distribution over the kept tokens is the softmax over its head's rows `kept_ids`.

Shapes: N counted positions, D hidden width, V rows of the teacher's head.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.data.data_files import regular_if_there
from stillhouse.data.shift import text_end
from stillhouse.data.windows import WindowSet
from stillhouse.errors import ModelError, RecipeError
from stillhouse.progress import bar
from stillhouse.pruning.calibrate import calibration_batches, products
from stillhouse.pruning.kept_tokens import Merges
from stillhouse.pruning.offload import released_after_use
from stillhouse.pruning.reference import rows_of
from stillhouse.pruning.surgery import named_ids
from stillhouse.shared_work import ALONE, Processes
from stillhouse.signals.lm_head import head_logits, row_chunks
from stillhouse.teachers.backbone import lm_head

KEPT_IDS = "kept_ids.json"
"""File in a student's folder if it has fewer tokens than its teacher: {"kept_ids": [...]}."""

MULTIPLE = 64
"""With `vocabulary: data`, tokens are added up to a multiple of this, for fast products."""


def kept_token_ids(
    tokenizer: Any,
    windows: WindowSet,
    vocabulary: int | Literal["data"] | Path,
    *,
    configs: Sequence[Any] = (),
    expect: Callable[[], Tensor] | None = None,
) -> tuple[int, ...]:
    """Choose the tokens to keep, ascending: kept_ids[new id] = old id.

    Some tokens are always kept: added and special tokens, those that `configs` name, and one token
    for every byte. Every kept token brings along the tokens that BPE builds it from. The model's
    padding rows, beyond the tokenizer's ids, are removed.

    Remaining places go to the tokens with the largest sum of up to three shares: in the windows; in
    the text that the teacher expects, since a removed token's probability goes to the others; and
    in general text, since the windows can be from a narrow domain. The last is estimated by Zipf's
    law from the order in which the tokenizer learned its tokens.

    Args:
        vocabulary: "data" keeps every token of the windows, and more up to a multiple of 64; a
            number keeps that many tokens in total; a file lists the tokens to keep, which must
            include those that are always kept.
        configs: configuration and generation configuration of the model.
        expect: returns each token's share of the text that the teacher expects (see
            `expected_tokens`). It runs the teacher, so it is called last, after all checks.

    Raises:
        RecipeError: the number is too small or larger than the tokenizer, the file cannot be read
            or lacks a token that is always kept, or the tokenizer is not BPE.
    """
    merges = Merges(tokenizer)
    named = {id for config in configs for id, _ in named_ids(config)}
    kept = named - merges.tokens.keys()
    total = len(merges.tokens) + len(kept)
    needed = _always_kept(merges, named)
    if isinstance(vocabulary, Path):
        requested = _listed(vocabulary, merges, needed, kept)
        return tuple(sorted(kept.union(*map(merges.parts, requested))))
    kept = kept.union(*map(merges.parts, needed))
    counts = Counter({id: n for id, n in _counts(windows).items() if id in merges.tokens})
    if vocabulary == "data":
        for id in counts:
            kept |= merges.parts(id)
        size = min(-(-len(kept) // MULTIPLE) * MULTIPLE, total)
    else:
        size = vocabulary
        if not len(kept) <= size <= total:
            raise RecipeError(
                f"vocabulary: {size} is not possible: special tokens and single bytes take up "
                f"{len(kept)} tokens, and the teacher has {total}",
                where="student.vocabulary",
                fix=f"nearest: {len(kept) if size < len(kept) else total}; or vocabulary: data",
            )
    for id in _by_share(merges, counts, None if expect is None else expect()):
        if len(kept) == size:
            break
        if id not in kept:
            missing = merges.parts(id) - kept
            if len(kept) + len(missing) <= size:
                kept |= missing
    return tuple(sorted(kept))


def require_listed_tokens(tokenizer: Any, file: Path, config: Any) -> None:
    """Raise the RecipeErrors of `kept_token_ids` about a file that do not depend on the model's
    generation configuration."""
    merges = Merges(tokenizer)
    needed = _always_kept(merges, {id for id, _ in named_ids(config)})
    _listed(file, merges, needed, range(config.vocab_size))


def _always_kept(merges: Merges, named: set[int]) -> set[int]:
    """The tokenizer's tokens that are always kept. named: ids that configurations name."""
    return merges.alphabet() | merges.added.keys() | (named & merges.tokens.keys())


@torch.no_grad()
def expected_tokens(
    model: Any,
    windows: WindowSet,
    tokens: int,
    seed: int,
    dtype: torch.dtype,
    processes: Processes = ALONE,
) -> Tensor:
    """Each token's share of the text that the model expects, [V].

    This is its mean probability over about `tokens` positions of the windows, which the processes
    share. Raises DataError if there are no windows.
    """
    batches = calibration_batches(windows, tokens, seed, model.device, processes=processes)
    head = lm_head(model)

    def zeros() -> list[Tensor]:
        return [torch.zeros(len(head.weight_VD), dtype=torch.float64)]

    def terms() -> Iterator[list[Tensor]]:
        with (
            products(model, dtype),
            released_after_use(model),
            bar("Predicting token frequencies with the teacher", tokens) as advance,
        ):
            for batch in batches:
                (sum_V,) = zeros()
                rows_ND = rows_of(model, batch).float()
                for chunk in row_chunks(head, len(rows_ND)):
                    probability_nV = head_logits(head, rows_ND[chunk]).float().softmax(-1)
                    sum_V += probability_nV.sum(0).cpu()
                yield [sum_V]
                advance(batch.input_ids_RL.numel() * processes.count)

    (sum_V,) = batches.sum(terms(), zeros)
    return sum_V / max(batches.tokens()[1], 1)


def _listed(file: Path, merges: Merges, needed: set[int], named: Collection[int]) -> set[int]:
    """The ids of the tokens listed in a file. Ids in `named` (named by a configuration, but not in
    the tokenizer) are skipped. Raises RecipeError if a needed token is missing."""
    regular_if_there(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
        listed = json.loads(text) if file.suffix == ".json" else text.split("\n")
        if isinstance(listed, dict):
            listed = listed.get("kept_ids")
        if not isinstance(listed, list):
            raise ValueError("it does not contain a list")
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"the list of tokens to keep cannot be read: {error}",
            where=file,
            fix="write one token per line, in the tokenizer's notation, or a list in a .json file",
        ) from error
    ids, unknown = set[int](), []
    for one in listed:
        id = merges.every_id.get(one, -1) if isinstance(one, str) else one
        if isinstance(id, int) and id in merges.tokens:
            ids.add(id)
        elif one != "" and not (isinstance(id, int) and id in named):  # Empty lines are skipped.
            unknown.append(str(one))
    if unknown:
        raise RecipeError(
            f"the list contains tokens that the teacher does not have ({len(unknown):,}): "
            f"{_few(unknown)}",
            where=file,
            fix="write tokens in the tokenizer's notation: Ġhouse, not ' house'",
        )
    if lost := needed - ids:
        names = [merges.tokens[id] for id in sorted(lost)]
        raise RecipeError(
            f"the list lacks required tokens ({len(lost):,}): {_few(names)}",
            where=file,
            fix="add them (all special tokens, and one for each byte), or use vocabulary: data",
        )
    return ids


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def save_kept_ids(kept_ids: Sequence[int], folder: Path) -> None:
    """Write KEPT_IDS into a student's folder."""
    (folder / KEPT_IDS).write_text(json.dumps({"kept_ids": list(kept_ids)}), encoding="utf-8")


def load_kept_ids(folder: Path) -> tuple[int, ...] | None:
    """The teacher's id for each id of the student in `folder`; None if they are the same.

    Raises ModelError if the file is damaged.
    """
    file = folder / KEPT_IDS
    if not file.exists():
        return None
    try:
        return tuple(int(id) for id in json.loads(file.read_text(encoding="utf-8"))["kept_ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the map from the student's to the teacher's token ids cannot be read: {error}",
            where=file,
            fix="prune the student again",
        ) from error


def _counts(windows: WindowSet) -> Counter[int]:
    """How often each token occurs in the windows' text (see `text_end`); 0 for tokens that only
    occur after its end."""
    counts: Counter[int] = Counter()
    for index in range(len(windows)):
        window = windows[index]
        ids_L, end = window["input_ids"], text_end(window["labels"])
        ids, times = torch.unique(ids_L[:end], return_counts=True)
        counts.update(dict(zip(ids.tolist(), times.tolist(), strict=True)))
        counts.update(dict.fromkeys(ids_L[end:].tolist(), 0))
    return counts


def _by_share(merges: Merges, counts: Counter[int], expected_V: Tensor | None) -> list[int]:
    """All tokens, sorted by the sum of their shares, largest first."""
    learned: dict[int, int] = {}
    for first, second in merges.pairs:
        id = merges.ids.get(first + second)
        if id is not None:
            learned.setdefault(id, len(learned) + 1)
    harmonic = sum(1 / rank for rank in learned.values())
    read = max(1, counts.total())
    expected = [] if expected_V is None else expected_V.tolist()

    def share(id: int) -> float:
        found: float = counts[id] / read + (expected[id] if id < len(expected) else 0.0)
        return found + (1 / learned[id] / harmonic if id in learned else 0.0)

    return sorted(merges.tokens, key=lambda id: (-share(id), id))

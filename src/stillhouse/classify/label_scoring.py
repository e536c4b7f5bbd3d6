"""A language model's exact probability of each label after a text, in one pass for all labels.

The prompts of all texts have a common prefix (instruction, examples): those tokens are run once and
their keys and values kept. A pass then reads the rest of some prompts and, after each, the inner
nodes of the labels' tree, with a mask in which a node attends to its prompt and to the tokens
before it in its own label. So a text with 77 labels needs one pass over its tokens, not 77.

Shapes: B prompts of a batch, P tokens of the shared prefix, L tokens of the longest rest, T inner
nodes of the labels' tree, E its edges, C labels, D hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from stillhouse.generation.kv_cache import fits_padding, fits_slots
from stillhouse.hardware import HeapLimit
from stillhouse.signals.lm_head import head_logits
from stillhouse.teachers.backbone import lm_head

ROOT = -1


@dataclass(frozen=True)
class LabelTree:
    """C labels, T inner nodes below the root, E edges.

    A node represents the tokens from the root to it; an inner node has tokens after it, and only
    those are ever run through a model. nodes_T: its own token. depths_T: 0 for a label's first
    token. edge_nodes_E, edge_tokens_E: the node that a token follows, `ROOT` for none, and the
    token. members_CE: 1 where the edge is part of the label. sees_TT: True where a node (row)
    attends to another: to itself and to those before it.
    """

    nodes_T: Tensor
    depths_T: Tensor
    edge_nodes_E: Tensor
    edge_tokens_E: Tensor
    members_CE: Tensor
    sees_TT: Tensor

    @property
    def inner(self) -> int:
        return len(self.nodes_T)

    def to(self, device: torch.device | str) -> LabelTree:
        return LabelTree(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def label_tree(labels: Sequence[Sequence[int]]) -> LabelTree:
    """Build the tree of the labels' tokens. No label may be empty or a prefix of another."""
    assert all(labels)
    inner: dict[tuple[int, ...], int] = {(): ROOT}
    edges: dict[tuple[int, int], int] = {}
    nodes: list[tuple[int, int]] = []
    parents: list[int] = []
    members: list[list[int]] = []
    for label in labels:
        path = []
        for depth, token in enumerate(label):
            here = inner[tuple(label[:depth])]
            path.append(edges.setdefault((here, token), len(edges)))
            through = tuple(label[: depth + 1])
            if depth + 1 < len(label) and through not in inner:
                inner[through] = len(nodes)
                nodes.append((token, depth))
                parents.append(here)
        members.append(path)
    members_CE = torch.zeros(len(labels), len(edges))
    for row, path in enumerate(members):
        members_CE[row, path] = 1.0
    sees_TT = torch.eye(len(nodes), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:  # parents come before their children
            sees_TT[node] |= sees_TT[parent]
    nodes_T, depths_T = torch.tensor(nodes, dtype=torch.long).reshape(-1, 2).T.contiguous()
    edge_nodes_E, edge_tokens_E = torch.tensor(list(edges), dtype=torch.long).T.contiguous()
    return LabelTree(nodes_T, depths_T, edge_nodes_E, edge_tokens_E, members_CE, sees_TT)


TOKENS_TOGETHER = 4096
"""Tokens of one pass, padding and label nodes included."""
ROWS_TOGETHER, PADDING = 8, 1.2
"""A batch of this many rows ends before one that is longer than its first by this factor: on short
texts and a CPU, that is 1.2 times as fast."""
_CACHED_TOKENS = 16384
"""Tokens whose keys and values are copied at a time, for models with windows."""
_HEAD_ROWS = 512
"""Rows whose logits over the full vocabulary are in memory at a time."""


@dataclass(frozen=True)
class Prefix:
    """The prefix of all prompts, and its keys and values; empty if cache is None."""

    length: int
    cache: Any

    def rows(self, count: int) -> Any:
        """A cache that a pass over `count` prompts may write to."""
        if self.cache is None:
            return None
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens in the shared prefix; every prompt keeps at least one more token."""
    # The first and last in lexicographic order differ earliest.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(len(prompt) for prompt in prompts) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return same


@torch.no_grad()
def score_labels(
    model: Any, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Tensor]]:
    """Log-probability of each label's tokens after each prompt: yields indices of some prompts, and
    their rows [B, C], float32 on the CPU, until all are done.

    model: a causal language model in eval mode. No label may be a prefix of another. Models with
    windows are run twice for each prompt, and those with recurrent states once for each prompt and
    label.
    """
    if not prompts:
        return
    if not fits_slots(model):
        windows = fits_padding(model)
        for index, prompt in enumerate(prompts):
            if windows:
                yield [index], score_with_cache(model, prompt, labels)[None]
            else:
                yield [index], score_pairs(model, [prompt], labels)
        return
    device = next(model.parameters()).device
    tree = label_tree(labels).to(device)
    prefix = _read_prefix(model, prompts[0][: shared_prefix(prompts)])
    widths = [len(prompt) - prefix.length + tree.inner for prompt in prompts]
    heap = HeapLimit()
    for chosen in batches_by_length(widths):
        rests = [prompts[index][prefix.length :] for index in chosen]
        yield chosen, tree_log_probabilities(model, rests, tree, prefix).cpu()
        heap.check()


def label_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    advance: Callable[[int], object] = lambda prompts: None,
) -> Tensor:
    """All rows of `score_labels`, in the prompts' order: [N, C]. advance: called with the number of
    prompts that are done since."""
    scores_NC = torch.zeros(len(prompts), len(labels))
    for chosen, scored in score_labels(model, prompts, labels):
        scores_NC[chosen] = scored
        advance(len(chosen))
    return scores_NC


def _read_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    if not ids:
        return Prefix(0, None)
    cache = DynamicCache(config=model.config)
    device = next(model.parameters()).device
    model.base_model(
        input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True
    )
    return Prefix(len(ids), cache)


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of row numbers, the shortest rows first, so that there is little padding: on 64 short
    texts, that is 1.6 times as fast as one batch on a CPU."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = lengths[index]
        full = bool(batch) and (len(batch) + 1) * tokens > TOKENS_TOGETHER
        padded = len(batch) >= ROWS_TOGETHER and tokens > PADDING * lengths[batch[0]]
        if full or padded:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


NO_PREFIX = Prefix(0, None)


def fits_tree(model: Any, longest: int) -> bool:
    """Whether `tree_log_probabilities` is exact for prompts that have up to `longest` tokens with
    their labels: a layer attends to all tokens before it, or to a window that has them all."""
    if fits_slots(model):
        return True
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    has_masks = model.config._attn_implementation == "sdpa" and fits_padding(model)
    return has_masks and window is not None and longest <= window


def tree_log_probabilities(
    model: Any, rests: Sequence[Sequence[int]], tree: LabelTree, prefix: Prefix = NO_PREFIX
) -> Tensor:
    """Log-probability of each label after each prompt, [B, C] in float32, in one pass, by a model
    that `fits_tree`.

    rests: the prompts without the prefix. Gradients flow if they are enabled.
    """
    device = tree.nodes_T.device
    lengths_B = torch.tensor([len(rest) for rest in rests], device=device)
    longest = int(lengths_B.max())
    padded = [[*rest, *[0] * (longest - len(rest))] for rest in rests]
    ids_BL = torch.tensor(padded, device=device)
    nodes_BT = tree.nodes_T.expand(len(rests), -1)
    places_BL = torch.arange(longest, device=device).expand(len(rests), -1)
    positions = torch.cat([places_BL, lengths_B[:, None] + tree.depths_T], 1) + prefix.length
    cache = prefix.rows(len(rests))
    hidden = model.base_model(
        input_ids=torch.cat([ids_BL, nodes_BT], 1),
        position_ids=positions,
        attention_mask=_mask(lengths_B, longest, tree, prefix.length),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    rows_B = torch.arange(len(rests), device=device)
    ends_B1D = hidden[rows_B, lengths_B - 1][:, None]
    # Row 0 is the prompt's last token, row 1 + t the node t: ROOT, which is -1, becomes 0.
    states_BSD = torch.cat([ends_B1D, hidden[:, longest:]], 1)
    return _edges(model, states_BSD, tree) @ tree.members_CE.T


def _mask(lengths_B: Tensor, longest: int, tree: LabelTree, prefix: int) -> Tensor:
    """[B, 1, L + T, P + L + T]: True where the row's token attends to the column's."""
    device, count, inner = lengths_B.device, len(lengths_B), tree.inner
    total = longest + inner
    mask = torch.zeros(count, total, prefix + total, dtype=torch.bool, device=device)
    mask[:, :, :prefix] = True
    places_L = torch.arange(longest, device=device)
    mask[:, :longest, prefix : prefix + longest] = places_L[:, None] >= places_L
    own_BL = places_L < lengths_B[:, None]
    mask[:, longest:, prefix : prefix + longest] = own_BL[:, None]
    mask[:, longest:, prefix + longest :] = tree.sees_TT
    return mask[:, None]


def _edges(model: Any, states_BSD: Tensor, tree: LabelTree) -> Tensor:
    """Log-probability of each edge's token after its node, [B, E]."""
    head = lm_head(model)
    count, _, width = states_BSD.shape
    flat_ND = states_BSD.reshape(-1, width)
    sources_E = tree.edge_nodes_E - ROOT
    at_NE = (torch.arange(count, device=sources_E.device)[:, None] * states_BSD.shape[1]) + (
        sources_E
    )
    totals, chosen = [], []
    tokens = tree.edge_tokens_E.unique()
    columns_E = torch.searchsorted(tokens, tree.edge_tokens_E)
    for part_ND in flat_ND.split(_HEAD_ROWS):
        logits_NV = head_logits(head, part_ND).float()
        totals.append(logits_NV.logsumexp(-1))
        chosen.append(logits_NV[:, tokens])
    total_N, chosen_NU = torch.cat(totals), torch.cat(chosen)
    return chosen_NU[at_NE, columns_E] - total_N[at_NE]


@torch.no_grad()
def score_with_cache(model: Any, prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
    """As `score_labels`, [C] for one prompt: it is run once, then the labels in parallel,
    each after a copy of its keys and values."""
    device = next(model.parameters()).device
    read = model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=True)
    first_1V = read.logits[:, -1].float().log_softmax(-1)
    together = max(1, _CACHED_TOKENS // (len(prompt) + max(map(len, labels))))
    scores = []
    for at in range(0, len(labels), together):
        some = labels[at : at + together]
        longest = max(map(len, some))
        ids_CL = torch.tensor([[*label, *[0] * (longest - len(label))] for label in some])
        ids_CL = ids_CL.to(device)
        log_p_CLV = first_1V.expand(len(some), 1, -1)
        if longest > 1:
            cache = copy.deepcopy(read.past_key_values)
            cache.batch_repeat_interleave(len(some))
            rest = model(input_ids=ids_CL[:, :-1], past_key_values=cache, use_cache=True)
            log_p_CLV = torch.cat([log_p_CLV, rest.logits.float().log_softmax(-1)], 1)
        picked_CL = log_p_CLV.gather(2, ids_CL[..., None])[..., 0]
        lengths_C = torch.tensor([len(label) for label in some], device=device)
        own_CL = torch.arange(longest, device=device) < lengths_C[:, None]
        scores.append((picked_CL * own_CL).sum(-1).cpu())
    return torch.cat(scores)


def score_pairs(
    model: Any, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> Tensor:
    """As `score_labels`, by one pass for each prompt and label: [B, C]. Any causal model. Gradients
    flow if they are enabled."""
    device = next(model.parameters()).device
    scores_BC = torch.zeros(len(prompts), len(labels))
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids_L = torch.tensor([*prompt, *label], device=device)
            logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0].float()
            log_p_LV = logits_LV[len(prompt) - 1 : -1].log_softmax(-1)
            picked = log_p_LV.gather(1, ids_L[len(prompt) :, None])
            scores_BC[row, column] = picked.sum().cpu()
    return scores_BC

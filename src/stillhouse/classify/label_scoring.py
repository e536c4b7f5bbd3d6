"""Computes a language model's exact probability of each label after a text, with one forward pass
for all labels.

The prompts of all texts share a prefix (instructions and examples), which runs through the model
once; its keys and values are cached. The labels' tokens form a tree (a trie). A forward pass reads
the rest of several prompts, each followed by the tree's inner nodes, with a mask under which a node
attends to its prompt and its ancestors. A text with 77 labels takes one pass instead of 77.

Shapes: B prompts of a batch, P tokens of the shared prefix, L tokens of the longest rest, T inner
nodes of the tree, E its edges, C labels, D hidden size, V vocabulary.
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
    """The tree of C labels' tokens, with T inner nodes below the root and E edges.

    A node represents the tokens on the path from the root. Only inner nodes, which have children,
    run through a model.
    nodes_T: each inner node's token. depths_T: its depth; 0 for a label's first token.
    edge_nodes_E, edge_tokens_E: each edge's parent node (`ROOT` for a label's first token), and its
    token. members_CE: 1 where the edge is part of the label. sees_TT: True where a node (row)
    attends to another (column): to itself and its ancestors.
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
    members: list[list[int]] = []
    for label in labels:
        paths = [tuple(label[:depth]) for depth in range(len(label))]
        for path in paths:
            inner.setdefault(path, len(inner) - 1)
        steps = [(inner[path], token) for path, token in zip(paths, label, strict=True)]
        members.append([edges.setdefault(step, len(edges)) for step in steps])
    members_CE = torch.zeros(len(labels), len(edges))
    for row, member in enumerate(members):
        members_CE[row, member] = 1.0
    nodes = [(path[-1], len(path) - 1) for path in inner if path]
    sees_TT = torch.eye(len(nodes), dtype=torch.bool)
    for path, node in inner.items():
        if len(path) > 1:  # parents come before their children
            sees_TT[node] |= sees_TT[inner[path[:-1]]]
    nodes_T, depths_T = torch.tensor(nodes, dtype=torch.long).reshape(-1, 2).T.contiguous()
    edge_nodes_E, edge_tokens_E = torch.tensor(list(edges), dtype=torch.long).T.contiguous()
    return LabelTree(nodes_T, depths_T, edge_nodes_E, edge_tokens_E, members_CE, sees_TT)


TOKENS_TOGETHER = 4096
"""Maximum number of tokens in a forward pass, including padding and label nodes."""
ROWS_TOGETHER, PADDING = 8, 1.2
"""A batch with at least this many rows ends before a row that is longer than its first row by more
than this factor. On short texts and a CPU, this is 1.2 times as fast."""
_CACHED_TOKENS = 16384
"""Number of tokens whose keys and values are copied at a time, for models with sliding windows."""
_HEAD_ROWS = 512
"""Number of rows whose logits over the full vocabulary are in memory at a time."""


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens in the prompts' shared prefix, leaving at least one token of each."""
    # The first and the last prompt in lexicographic order share only what all prompts share.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(len(prompt) for prompt in prompts) - 1
    same = 0
    while same < most and first[same] == last[same]:
        same += 1
    return same


@torch.no_grad()
def label_scores(
    model: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    advance: Callable[[int], object] = lambda prompts: None,
) -> Tensor:
    """The log-probability of each label's tokens after each prompt, [N, C] in float32 on the CPU.

    model: a causal language model in eval mode. labels: none may be a prefix of another. advance:
    called after each batch, with the number of its prompts. Models with sliding windows run at
    least twice for each prompt, and those with recurrent states once for each prompt and label.
    """
    scores_NC = torch.zeros(len(prompts), len(labels))
    if not prompts:
        return scores_NC
    if not fits_slots(model):
        windows = fits_padding(model)
        for row, prompt in enumerate(prompts):
            if windows:
                scores_NC[row] = score_with_cache(model, prompt, labels)
            else:
                scores_NC[row] = score_pairs(model, [prompt], labels)[0]
            advance(1)
        return scores_NC
    device = next(model.parameters()).device
    tree = label_tree(labels).to(device)
    shared, cache = shared_prefix(prompts), None
    if shared:
        cache = DynamicCache(config=model.config)
        prefix_1P = torch.tensor([list(prompts[0][:shared])], device=device)
        model.base_model(input_ids=prefix_1P, past_key_values=cache, use_cache=True)
    heap = HeapLimit()
    for chosen in batches_by_length([len(prompt) - shared + tree.inner for prompt in prompts]):
        rests = [prompts[index][shared:] for index in chosen]
        scores_NC[chosen] = tree_log_probabilities(model, rests, tree, cache).cpu()
        advance(len(chosen))
        heap.check()
    return scores_NC


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of row numbers, shortest rows first, to limit padding. On 64 short texts and a
    CPU, this is 1.6 times as fast as one batch."""
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


def fits_tree(model: Any, longest: int) -> bool:
    """Whether `tree_log_probabilities` is exact for this model, because every layer attends to all
    previous tokens or to a sliding window that contains them all.

    longest: the number of tokens in the longest prompt together with its labels.
    """
    if fits_slots(model):
        return True
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    has_masks = model.config._attn_implementation == "sdpa" and fits_padding(model)
    return has_masks and window is not None and longest <= window


def tree_log_probabilities(
    model: Any,
    rests: Sequence[Sequence[int]],
    tree: LabelTree,
    prefix: DynamicCache | None = None,
) -> Tensor:
    """Return the log-probability of each label after each prompt, [B, C] in float32, from one
    forward pass.

    model: one that `fits_tree`. rests: the prompts without their shared prefix. prefix: its keys
    and values; None if it is empty. Gradients flow if they are enabled.
    """
    read, cache = 0, None
    if prefix is not None:
        read = prefix.get_seq_length()
        cache = copy.deepcopy(prefix)  # the pass writes to it
        cache.batch_repeat_interleave(len(rests))
    device = tree.nodes_T.device
    lengths_B = torch.tensor([len(rest) for rest in rests], device=device)
    longest = int(lengths_B.max())
    padded = [[*rest, *[0] * (longest - len(rest))] for rest in rests]
    ids_BL = torch.tensor(padded, device=device)
    nodes_BT = tree.nodes_T.expand(len(rests), -1)
    places_BL = torch.arange(longest, device=device).expand(len(rests), -1)
    positions = torch.cat([places_BL, lengths_B[:, None] + tree.depths_T], 1) + read
    hidden = model.base_model(
        input_ids=torch.cat([ids_BL, nodes_BT], 1),
        position_ids=positions,
        attention_mask=_mask(lengths_B, longest, tree, read),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    rows_B = torch.arange(len(rests), device=device)
    ends_B1D = hidden[rows_B, lengths_B - 1][:, None]
    # Row 0 is the prompt's last token, and row 1 + t is node t, so ROOT (-1) becomes row 0.
    states_BSD = torch.cat([ends_B1D, hidden[:, longest:]], 1)
    return _edges(model, states_BSD, tree) @ tree.members_CE.T


def _mask(lengths_B: Tensor, longest: int, tree: LabelTree, prefix: int) -> Tensor:
    """The attention mask, [B, 1, L + T, P + L + T]: True where a row attends to a column."""
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
    """The log-probability of each edge's token after its parent node, [B, E]."""
    head = lm_head(model)
    count, states, _ = states_BSD.shape
    firsts_B = torch.arange(count, device=states_BSD.device) * states
    at_BE = firsts_B[:, None] + tree.edge_nodes_E - ROOT  # rows of all prompts' states
    totals, chosen = [], []
    tokens = tree.edge_tokens_E.unique()
    columns_E = torch.searchsorted(tokens, tree.edge_tokens_E)
    for part_ND in states_BSD.flatten(0, 1).split(_HEAD_ROWS):
        logits_NV = head_logits(head, part_ND).float()
        totals.append(logits_NV.logsumexp(-1))
        chosen.append(logits_NV[:, tokens])
    total_N, chosen_NU = torch.cat(totals), torch.cat(chosen)
    return chosen_NU[at_BE, columns_E] - total_N[at_BE]


def score_with_cache(model: Any, prompt: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
    """Like `label_scores` for one prompt, [C]. The prompt runs once; the labels then run in
    parallel, each with a copy of its keys and values."""
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
    """Like `label_scores`, [B, C], with one forward pass for each prompt and label.

    model: any causal language model. Gradients flow if they are enabled.
    """
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

"""Labels as a tree of tokens, so that common prefixes are scored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1


@dataclass(frozen=True)
class LabelTree:
    """C labels, T inner nodes below the root, E edges.

    A node represents the tokens from the root to it; an inner node has tokens after it, and only
    those are ever run through a model. nodes_T: its own token. parents_T: the inner node before
    it, `ROOT` for none. depths_T: 0 for a label's first token. edge_nodes_E, edge_tokens_E: the
    node that a token follows, and the token. members_CE: 1 where the edge is part of the label.
    sees_TT: True where a node (row) attends to another: to itself and to those before it.
    """

    nodes_T: Tensor
    parents_T: Tensor
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
    nodes: list[tuple[int, int, int]] = []
    members: list[list[int]] = []
    for label in labels:
        path = []
        for depth, token in enumerate(label):
            here = inner[tuple(label[:depth])]
            path.append(edges.setdefault((here, token), len(edges)))
            through = tuple(label[: depth + 1])
            if depth + 1 < len(label) and through not in inner:
                inner[through] = len(nodes)
                nodes.append((token, here, depth))
        members.append(path)
    members_CE = torch.zeros(len(labels), len(edges))
    for row, path in enumerate(members):
        members_CE[row, path] = 1.0
    sees_TT = torch.eye(len(nodes), dtype=torch.bool)
    for node, (_, parent, _) in enumerate(nodes):
        if parent != ROOT:  # parents come before their children
            sees_TT[node] |= sees_TT[parent]
    columns = torch.tensor(nodes, dtype=torch.long).reshape(-1, 3)
    pairs = torch.tensor(list(edges), dtype=torch.long)
    nodes_T, parents_T, depths_T = columns.T.contiguous()
    edge_nodes_E, edge_tokens_E = pairs.T.contiguous()
    return LabelTree(nodes_T, parents_T, depths_T, edge_nodes_E, edge_tokens_E, members_CE, sees_TT)

"""Connected components of graphs of tokens, by way of their spanning trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spanning_tree(likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum spanning tree of G complete graphs [G, N, N]: weights [G, N - 1] and ends [G, N - 1, 2] of its edges.

    The edges above a threshold connect the same nodes as all edges of the graph above it.
    """
    rows = torch.arange(len(likeness), device=likeness.device)
    best, parent = likeness[:, 0].clone(), torch.zeros_like(likeness[:, 0], dtype=torch.long)
    best[:, 0] = -torch.inf
    inside = torch.zeros_like(parent, dtype=torch.bool)
    inside[:, 0] = True
    weights, ends = [best[:, :0]], [parent[:, :0, None].expand(-1, -1, 2)]
    for _ in range(likeness.shape[1] - 1):
        node = best.argmax(1)
        weights.append(best[rows, node, None])
        ends.append(torch.stack([parent[rows, node], node], -1)[:, None])
        inside[rows, node] = True
        closer = ~inside & (likeness[rows, node] > best)
        parent = torch.where(closer, node[:, None], parent)
        best = torch.where(closer, likeness[rows, node], best).masked_fill(inside, -torch.inf)
    return torch.cat(weights, 1), torch.cat(ends, 1)


def strongest(weight: Tensor, ends: Tensor, above: float) -> list[list[int]]:
    """Ends [E, 2] of the edges heavier than `above`, strongest first."""
    order = weight.sort(descending=True, stable=True).indices
    found: list[list[int]] = ends[order[weight[order] > above]].tolist()
    return found


def root(parent: list[int], node: int) -> int:
    """The node that names the component of `node`; paths in `parent` are shortened on the way."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def joined_by(edges: Sequence[Sequence[int]], nodes: int) -> list[int]:
    """The first node of every node's component."""
    parent = list(range(nodes))
    for a, b in edges:
        one, other = sorted((root(parent, a), root(parent, b)))
        parent[other] = one
    return [root(parent, i) for i in parent]


def mean_of(group: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The matrix [count, M] that takes M vectors to the means of their groups [M], numbered 0 .. count - 1."""
    member = (group == torch.arange(count, device=group.device)[:, None]).to(dtype)
    return member / member.sum(1, keepdim=True)


def left_by(
    edges: Sequence[Sequence[int]], frame: Sequence[int], least: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """Joins nodes along edges until `least` survive: one per component, the earliest, but the last of a frame stays.

    Args:
        edges: strongest first, of a tree.
        frame: ascending, of every node.

    Returns:
        The survivors in their order; every node's component, numbered by first nodes; and for every component and frame
        the place among the survivors of that which stands for the component there, the latest until then or the first.
    """
    left = [frame.count(t) for t in range(frame[-1] + 1)]
    parent, stays = list(range(len(frame))), set(range(len(frame)))
    first = list(parent)  # the survivor of a component that may still go
    for a, b in edges:
        if len(stays) == least:
            break
        one, other = sorted((root(parent, a), root(parent, b)))
        early, late = sorted((first[one], first[other]))
        gone = late if left[frame[late]] > 1 else early
        if left[frame[gone]] > 1:
            stays.remove(gone)
            left[frame[gone]] -= 1
        first[one] = early if gone == late else late
        parent[other] = one
    roots = [root(parent, r) for r in range(len(frame))]
    number = {c: i for i, c in enumerate(sorted(set(roots)))}
    kept, keeper = sorted(stays), [[-1] * len(left) for _ in number]
    for place, r in enumerate(kept):
        row = keeper[number[roots[r]]]
        start = 0 if row[0] < 0 else frame[r]
        row[start:] = [place] * (len(row) - start)
    return kept, [number[c] for c in roots], keeper

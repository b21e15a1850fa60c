"""k-means and the silhouette, in numpy."""

from __future__ import annotations

import numpy as np

from vtprune.video.embedding import Array

ITERATIONS = 50
TOGETHER = 512  # rows of the distance matrix that exist at once


def squared_distances(x: Array, y: Array) -> Array:
    """[N, M] squared Euclidean distances between rows of x [N, D] and y [M, D]; zero between equal rows up to rounding."""
    square = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return np.asarray(np.maximum(square, 0))


def k_means(x: Array, k: int, seed: int) -> tuple[Array, Array]:
    """Lloyd's k-means from k-means++ centres.

    A cluster that runs empty gets the point farthest from its own centre, so that none is empty in the end.

    Args:
        x: [N, D].
        k: at most N.
        seed: of the k-means++ draw.

    Returns:
        Cluster of every row [N] int64, and the centres [k, D]. Deterministic.
    """
    generator = np.random.default_rng(seed)
    centres = x[[generator.integers(len(x))]]
    nearest = squared_distances(x, centres)[:, 0]
    while len(centres) < k:
        total = nearest.sum()
        chances = nearest / total if total > 0 else None
        new = x[[generator.choice(len(x), p=chances)]]
        centres = np.concatenate([centres, new])
        nearest = np.minimum(nearest, squared_distances(x, new)[:, 0])
    labels = np.full(len(x), -1)
    for _ in range(ITERATIONS):
        distance = squared_distances(x, centres)
        before, labels = labels, distance.argmin(1)
        _fill_empty(labels, distance, k)
        if (labels == before).all():
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, x)
        centres = sums / np.bincount(labels, minlength=k)[:, None]
    return labels, centres


def _fill_empty(labels: Array, distance: Array, k: int) -> None:
    """Moves the farthest points of clusters with several into clusters without any, in place."""
    count = np.bincount(labels, minlength=k)
    own = distance[np.arange(len(labels)), labels]
    for empty in np.flatnonzero(count == 0):
        farthest = np.where(count[labels] > 1, own, -1).argmax()
        count[labels[farthest]] -= 1
        count[empty] += 1
        labels[farthest], own[farthest] = empty, 0


def silhouettes(x: Array, labellings: list[Array]) -> Array:
    """The mean silhouette of each clustering.

        a_i = mean distance to the others of its cluster, b_i = least mean distance to another cluster
        s_i = (b_i - a_i) / max(a_i, b_i), 0 where a cluster has one member or both are 0

    Args:
        x: [N, D].
        labellings: clusters [N], numbered from 0, none empty; a single cluster counts as 0.

    Returns:
        [len(labellings)].
    """
    members = [np.eye(labels.max() + 1)[labels] for labels in labellings]  # [N, k]
    total = np.zeros(len(labellings))
    for start in range(0, len(x), TOGETHER):
        rows = np.arange(start, min(start + TOGETHER, len(x)))
        distance = np.sqrt(squared_distances(x[rows], x))
        distance[np.arange(len(rows)), rows] = 0
        for i, (member, labels) in enumerate(zip(members, labellings, strict=True)):
            if member.shape[1] == 1:
                continue
            count, own = member.sum(0), labels[rows]
            sums = distance @ member
            here = (np.arange(len(rows)), own)
            a = sums[here] / np.maximum(count[own] - 1, 1)
            mean = sums / count
            mean[here] = np.inf
            b = mean.min(1)
            largest = np.maximum(a, b)
            s = np.where((count[own] > 1) & (largest > 0), (b - a) / np.where(largest > 0, largest, 1), 0)
            total[i] += s.sum()
    return total / len(x)

"""Selections that several methods share; torch only, batched over images, ties going to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune import ops
from vtprune.finite import check_finite
from vtprune.selection import Selection, merged


def widened(x: Tensor) -> Tensor:
    """At least float32: scores of half-precision models tie and overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Vectors [..., D] of length 1, in at least float32; zero stays zero."""
    return normalize(widened(x), dim=-1)


def min_max(x: Tensor) -> Tensor:
    """Scores [G, N] stretched to [0, 1] per image; zeros where all are equal."""
    low = x.amin(-1, keepdim=True)
    span = x.amax(-1, keepdim=True) - low
    return (x - low) / torch.where(span > 0, span, torch.ones_like(span))


def of_everyone(mask: Tensor, k: int) -> Tensor:
    """Ascending indices [G, k] of a bool mask [G, N] with k true entries per image; waits for no device."""
    return mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :k]


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN clustering: centres are dense and far from anything denser.

        rho_i = exp(-mean of the `clusters` smallest |x_i - x_j|^2 / D, itself among them)
        delta_i = distance to the nearest denser token, the largest distance of all for the densest
        centres = argtopk(rho delta); everyone joins the nearest centre, a centre itself

    Args:
        x: [G, M, D].
        clusters: at most M.

    Returns:
        Centres [G, clusters], best first, and for every token the number [G, M] of its centre in that list.
    """
    score, distance = peak_scores(x, clusters)
    centres = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :clusters]
    to_centres = distance.gather(1, centres.unsqueeze(-1).expand(-1, -1, x.shape[1]))
    number = torch.arange(clusters, device=x.device).expand_as(centres)
    return centres, to_centres.argmin(1).scatter(1, centres, number)


def peak_scores(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """rho delta [G, M] of :func:`density_peaks` from that many nearest tokens, and the distances [G, M, M]."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    nearest = distance.sort(-1).values[..., :neighbours]
    density = (-nearest.square().mean(-1)).exp()
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [G, i, j]: j denser than i
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    apart = torch.where(denser, distance, farthest).amin(-1)
    return apart * density, distance


def farthest_first(weight: Tensor, distance: Tensor, k: int) -> Tensor:
    """:func:`vtprune.ops.farthest_first` of scores that may be NaN.

    Raises:
        NonFiniteScoresError: they are.
    """
    check_finite(weight)
    check_finite(distance)
    return ops.farthest_first(weight, distance, k)


def merged_into_closest(features: Tensor, kept: Tensor, beta: float) -> Selection:
    """Dropped tokens join the survivor of largest cosine c with weight beta max(c, 0) against its 1, normalised.

    Args:
        features: [G, N, D].
        kept: [G, k] survivors; of equally close ones the first in this order counts.
        beta: 0 discards the others.
    """
    if beta == 0 or kept.shape[1] == features.shape[1]:
        return Selection.of(kept)
    closest, slot = ops.best_match(features, ops.gather_tokens(features, kept))
    target = kept.gather(1, slot).scatter(1, kept, kept)
    weight = (beta * closest.clamp(min=0)).scatter(1, kept, 1.0)
    total = torch.zeros_like(weight).scatter_add(1, target, weight)
    return merged(kept, target, weight / total.gather(1, target))

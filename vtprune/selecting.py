"""Selections that several methods share; torch only, batched over images, ties going to the lower index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.selection import Selection, check_finite, merged

# Share of a token's own weight below which nothing of it is left to explain.
EXHAUSTED = 1e-6


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


def dpp_map(kernel: Tensor, k: int) -> Tensor:
    """Greedy maximum a posteriori set of a determinantal point process.

        j = argmax d;   e = (K_j - C_j C) / sqrt(d_j);   d <- d - e^2;   append e to C

    Once the chosen tokens explain all others (d at most 1e-6 of the diagonal), the lowest free indices follow.

    Args:
        kernel: [G, N, N] positive semi-definite.
        k: at most N.

    Returns:
        [G, k] indices in the order in which they were chosen.
    """
    images, n = kernel.shape[:2]
    image = torch.arange(images, device=kernel.device)
    own = kernel.diagonal(dim1=1, dim2=2)
    gain = own.clone()
    rows = kernel.new_zeros(images, k, n)
    chosen = torch.empty(images, k, dtype=torch.long, device=kernel.device)
    for i in range(k):
        j = gain.argmax(-1)
        best = gain[image, j].unsqueeze(-1)
        known = rows[:, :i]
        row = kernel[image, j] - torch.einsum("gi,gin->gn", known[image, :, j], known)
        row = torch.where(best > 0, row / best.clamp(min=torch.finfo(best.dtype).tiny).sqrt(), 0.0)
        rows[:, i], chosen[:, i] = row, j
        gain = gain - row.square()
        gain = torch.where(gain <= EXHAUSTED * own, 0.0, gain)
        gain.scatter_(1, chosen[:, : i + 1], float("-inf"))
    return chosen


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
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    nearest = distance.sort(-1).values[..., :clusters]
    density = (-nearest.square().mean(-1)).exp()
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [G, i, j]: j denser than i
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    apart = torch.where(denser, distance, farthest).amin(-1)
    centres = torch.sort(apart * density, dim=-1, descending=True, stable=True).indices[:, :clusters]
    to_centres = distance.gather(1, centres.unsqueeze(-1).expand(-1, -1, x.shape[1]))
    number = torch.arange(clusters, device=x.device).expand_as(centres)
    return centres, to_centres.argmin(1).scatter(1, centres, number)


def farthest_first(weight: Tensor, distance: Tensor, k: int) -> Tensor:
    """Greedy choice of k tokens by weight times distance to the nearest chosen one; [G, k], in order of choice.

    Args:
        weight: [G, N] non-negative.
        distance: [G, N, N].
    """
    check_finite(weight)
    check_finite(distance)
    image = torch.arange(len(weight), device=weight.device)
    chosen = weight.argmax(-1)
    order = [chosen]
    nearest = torch.full_like(weight, float("inf"))
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, distance[image, chosen].clamp(min=0))
        nearest[image, chosen] = float("-inf")
        chosen = (weight * nearest).where(nearest >= 0, nearest).argmax(-1)
        order.append(chosen)
    return torch.stack(order, 1)


def merged_into_closest(features: Tensor, kept: Tensor, beta: float) -> Selection:
    """Dropped tokens join the survivor of largest cosine c with weight beta max(c, 0) against its 1, normalised.

    Args:
        features: [G, N, D].
        kept: [G, k] survivors; of equally close ones the first in this order counts.
        beta: 0 discards the others.
    """
    n = features.shape[1]
    if beta == 0 or kept.shape[1] == n:
        return Selection.of(kept)
    vectors = normalize(features.float(), dim=-1)
    closest, slot = (vectors @ vectors.transpose(1, 2)).gather(2, kept[:, None].expand(-1, n, -1)).max(-1)
    target = kept.gather(1, slot).scatter(1, kept, kept)
    weight = (beta * closest.clamp(min=0)).scatter(1, kept, 1.0)
    total = torch.zeros_like(weight).scatter_add(1, target, weight)
    return merged(kept, target, weight / total.gather(1, target))

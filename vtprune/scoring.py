"""Scores and score transforms that several methods share, and small helpers around counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Tensor

from vtprune.errors import InvalidOptionError
from vtprune.method import View, resolve_layer
from vtprune.ops import best_match
from vtprune.selection import Selection, merged, topk

# ---------------------------------------------------------------------- scores


def uniform(view: View, seed: int) -> Tensor:
    """[G, N] numbers in [0, 1) that depend on `seed` and the picture alone, not on the batch; a token has the same in all
    stages."""
    rows = []
    for index, n, image_seed in zip(view.index, view.n_original, view.image_seeds, strict=True):
        # A checksum, since a CPU generator reads only 32 bits of its seed.
        generator = torch.Generator().manual_seed(crc32(f"{seed} {image_seed}".encode()))
        rows.append(torch.rand(n, generator=generator).to(index.device, non_blocking=True)[index])
    return torch.stack(rows)


def drawn(weights: Tensor, view: View, seed: int) -> Tensor:
    """Scores [G, N] whose k largest are k tokens drawn without replacement, in proportion to weights >= 0."""
    # The first arrivals of exponential clocks whose rates are the weights are such a draw.
    return uniform(view, seed).log() / weights


def outliers(scores: Tensor) -> Tensor:
    """[G] number of scores [G, N] above Q3 + 1.5 (Q3 - Q1), quartiles interpolated linearly (PruMerge)."""
    exact = scores.double()
    low, high = exact.quantile(exact.new_tensor([0.25, 0.75]), dim=-1)
    fence: Tensor = high + 1.5 * (high - low)
    return (exact > fence.unsqueeze(-1)).sum(-1)


def rollout(maps: Sequence[Tensor], queries: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020) of some queries, back to the first layer's input.

    Per layer A' = (A + I) / 2 with rows renormalised; the result is queries A'_L ... A'_1.

    Args:
        maps: [G, M, M] head-mean attention of consecutive layers, the earliest first.
        queries: [G, M] weights of the queries at the last layer.

    Returns:
        [G, M] share of every input token.
    """
    row = queries.float().unsqueeze(1)
    for attention in reversed(maps):
        mixed = attention.float() + torch.eye(attention.shape[-1], device=attention.device)
        row = row @ (mixed / mixed.sum(-1, keepdim=True))
    return row[:, 0]


def calibrated(attention: Tensor, t: float) -> Tensor:
    """Mean attention [G, N] that tokens receive from the queries that receive more than `t` times the mean (VFlowOpt).

    If there is no such query, the one that receives most is asked alone.

    Args:
        attention: [G, N, N].
    """
    received = attention.mean(1)
    votes = received > t * received.mean(-1, keepdim=True)
    most = torch.zeros_like(votes).scatter(1, topk(received, 1), True)
    asked = torch.where(votes.any(-1, keepdim=True), votes, most).float()
    return (asked.unsqueeze(1) @ attention)[:, 0] / asked.sum(-1, keepdim=True)


def grey_entropy(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Shannon entropy [G, N] in bits of the 256-bin histogram of every token's grey values (VFlowOpt).

    Grey is the mean of the channels, brought back to 0 .. 255, rounded and clamped there.

    Args:
        pixels: [G, N, C, P] as the model is given them.
        mean, std: per channel, what the processor normalised them with.

    Raises:
        InvalidOptionError: there are more or fewer channels than that.
    """
    if len(mean) != pixels.shape[2]:
        raise InvalidOptionError(
            f"{len(mean)} means and deviations were given for pixels of {pixels.shape[2]} channels; give one per channel."
        )
    shift, scale = (torch.tensor(x, device=pixels.device).unsqueeze(-1) for x in (mean, std))
    grey = (255 * (pixels.float() * scale + shift).mean(2)).round().clamp(0, 255).long()
    counts = torch.zeros(*grey.shape[:2], 256, device=grey.device).scatter_add(
        2, grey, torch.ones(grey.shape, device=grey.device)
    )
    bits: Tensor = torch.special.entr(counts / grey.shape[2]).sum(-1) / math.log(2)
    return bits


def attention_flow(maps: Sequence[Tensor], query: int) -> Tensor:
    """Attention flow (Abnar & Zuidema 2020), an offline diagnostic for small M: cost grows as layers^2 M^4.

    The maximum flow from `query` behind the last layer to every input token, through edges of capacity
    (A + I) / 2 between consecutive layers; normalised over the input tokens.

    Args:
        maps: [M, M] head-mean attention of consecutive layers, the earliest first.

    Returns:
        [M] float64.
    """
    m, depth = len(maps[0]), len(maps)
    capacity: dict[int, dict[int, float]] = {node: {} for node in range((depth + 1) * m)}
    for layer, attention in enumerate(maps, start=1):
        mixed = (attention.double() + torch.eye(m, dtype=torch.float64)) / 2
        for i, row in enumerate((mixed / mixed.sum(-1, keepdim=True)).tolist()):
            for j, weight in enumerate(row):
                if weight > 0:
                    capacity[layer * m + i][(layer - 1) * m + j] = weight
    flows = torch.tensor([_max_flow(capacity, depth * m + query, j) for j in range(m)], dtype=torch.float64)
    return flows / flows.sum()


def _max_flow(capacity: dict[int, dict[int, float]], source: int, sink: int) -> float:
    """Edmonds-Karp: augments along shortest paths until none is left."""
    left = {node: dict(edges) for node, edges in capacity.items()}
    total = 0.0
    while True:
        before: dict[int, int] = {source: source}
        queue = [source]
        for node in queue:
            for other, room in left[node].items():
                if room > 1e-12 and other not in before:
                    before[other] = node
                    queue.append(other)
        if sink not in before:
            return total
        path, node = [], sink
        while node != source:
            path.append((before[node], node))
            node = before[node]
        step = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= step
            left[b][a] = left[b].get(a, 0.0) + step
        total += step


def desink(scores: Tensor, threshold: float = 0.1, beta: float = 0.4) -> Tensor:
    """Damps attention sinks (ACT): sinks keep `beta` of their attention, the others share what is freed.

    A sink is a token whose score exceeds `threshold`; the freed mass goes to the others in proportion to their
    scores, so that the sum stays. Without any other mass to receive it, nothing changes.

    Args:
        scores: [..., N] attention that tokens receive.

    Returns:
        [..., N].
    """
    sinks = scores > threshold
    freed = (1 - beta) * scores.where(sinks, 0).sum(-1, keepdim=True)
    rest = scores.masked_fill(sinks, 0).sum(-1, keepdim=True)
    calibrated = torch.where(sinks, beta * scores, scores * (1 + freed / rest))
    return torch.where(rest > 0, calibrated, scores)


# ---------------------------------------------------------------------- merging


def merge_pairs(metric: Tensor, sizes: Tensor, k: int) -> Selection:
    """ToMe's bipartite soft matching, repeated while more than half of the tokens have to go.

    Every second token is a source, its best partner the other token of largest cosine; the best pairs merge into
    means weighted by `sizes`.

    Args:
        metric: [G, N, d]; what is compared.
        sizes: [G, N] tokens that each stands for.
        k: tokens left.
    """
    images, n = sizes.shape
    alive = torch.arange(n, device=sizes.device).expand(images, n)
    place, key, size = alive, metric.float(), sizes.float()
    while (m := alive.shape[1]) > k:
        cosine, partner = best_match(key[:, ::2], key[:, 1::2])
        source = topk(cosine, min(m - k, m // 2))
        into = 2 * partner.gather(1, source) + 1
        here = torch.arange(m, device=alive.device).expand(images, m)
        target = here.scatter(1, 2 * source, into)
        stays = target == here
        target = (stays.cumsum(1) - 1).gather(1, target)
        place = target.gather(1, place)
        total = size.new_zeros(images, int(stays[0].sum())).scatter_add(1, target, size)
        mass = key * size.unsqueeze(-1)
        key = torch.zeros_like(mass[:, : total.shape[1]]).scatter_add(
            1, target.unsqueeze(-1).expand_as(mass), mass
        ) / total.unsqueeze(-1)
        alive, size = alive[stays].view(images, -1), total
    return Selection(tuple(alive.unbind(0)), place, sizes.float() / size.gather(1, place))


def recycled(scores: Tensor, cells: Tensor, k: int) -> Selection:
    """The best tokens [G, N], and one more for every cell with others: k in all.

    One more token kept leaves as many or one less cell with pruned tokens, so that every k from the number of cells on
    can be met. A token weighs as much as its score, one below 0 nothing.
    """
    images, n = scores.shape
    order = topk(scores, n)
    everyone = torch.arange(n, device=scores.device).expand(images, n)
    rank = torch.empty_like(order).scatter(1, order, everyone)
    names = cells.unique()
    inside = cells.unsqueeze(1) == names.unsqueeze(-1)  # [G, C, N]
    last = rank.unsqueeze(1).where(inside, -1).amax(-1)  # [G, C], -1 for cells of other images
    total = everyone + (last.unsqueeze(-1) >= everyone.unsqueeze(1)).sum(1)  # with the best 0 .. N - 1 kept
    if bool((total[:, 0] > k).any()):
        return Selection.topk(scores, k)
    m = (total <= k).sum(-1, keepdim=True) - 1
    pruned = rank >= m
    best = rank.unsqueeze(1).where(inside & pruned.unsqueeze(1), n).amin(-1)  # [G, C]
    mine = best.gather(1, inside.long().argmax(1))
    anchor = order.gather(1, mine.clamp(max=n - 1))
    target = torch.where(pruned, anchor, everyone)
    share = scores.clamp(min=1e-12)
    mass = torch.zeros_like(share).scatter_add(1, target, share)
    weight = torch.where(pruned, share / mass.gather(1, target), 1.0)
    kept = everyone[target == everyone].view(images, k)
    return merged(kept, target, weight)


# ---------------------------------------------------------------------- counts and layers


def together(parts: Sequence[Selection], images: Sequence[Sequence[int]] | None = None) -> Selection:
    """One selection of the images of several; where some merge, the others keep vectors as they are.

    Args:
        images: for every part, the numbers that its images have in the result; None puts one part behind the other.
    """
    if images is None:
        numbers = itertools.count()
        images = [[next(numbers) for _ in part.index] for part in parts]
    order = sorted((g, p, i) for p, some in enumerate(images) for i, g in enumerate(some))
    index = tuple(parts[p].index[i] for _, p, i in order)
    if not any(part.merges for part in parts):
        return Selection(index)
    n = max(_width(part) for part in parts)
    if all(part.mix is None for part in parts):
        pairs = [_slots(parts[p], i, n) for _, p, i in order]
        return Selection(index, torch.cat([into for into, _ in pairs]), torch.cat([w for _, w in pairs]))
    mix = tuple(_matrix(parts[p], i, n) for _, p, i in order)
    if all(part.sources is None for part in parts):
        return Selection(index, mix=mix)
    own = [part.sources or tuple((i,) for i in range(len(part.index))) for part in parts]
    return Selection(
        index, mix=mix, sources=tuple(tuple(images[p][s] for s in own[p][i]) for _, p, i in order)
    )


def _width(part: Selection) -> int:
    """Tokens per image where a selection merges, else 0."""
    if part.mix is not None:
        return part.mix[0].shape[1] // (1 if part.sources is None else len(part.sources[0]))
    return 0 if part.into is None else part.into.shape[1]


def _slots(part: Selection, i: int, n: int) -> tuple[Tensor, Tensor]:
    """`into` and `weight` [1, n] of an image whose part has no `mix`."""
    if part.into is not None and part.weight is not None:
        return part.into[i : i + 1], part.weight[i : i + 1]
    kept = part.index[i]
    slots = torch.arange(len(kept), device=kept.device)
    return kept.new_full((1, n), -1).scatter(1, kept[None], slots[None]), torch.ones(1, n, device=kept.device)


def _matrix(part: Selection, i: int, n: int) -> Tensor:
    """The row of `mix` of an image."""
    if part.mix is not None:
        return part.mix[i]
    into, weight = _slots(part, i, n)
    slots = len(part.index[i])
    return weight.new_zeros(slots + 1, n).scatter(0, into.where(into >= 0, slots), weight)[:-1]


def by_count(view: View, counts: Sequence[int], decide: Callable[[View], Selection]) -> Selection:
    """Lets `decide` choose a count of its own for every image; images that keep all tokens are not shown to it."""
    parts, images = [], []
    for count in sorted(set(counts)):
        members = [g for g, c in enumerate(counts) if c == count]
        if count == view.n:
            parts.append(Selection.everything(len(members), count, view.features.device))
        else:
            parts.append(decide(_some(view, members, count)))
        images.append(members)
    return together(parts, images)


def _some(view: View, images: list[int], k: int) -> View:
    return View(
        features=view.features[images],
        index=view.index[images],
        layout=[view.layout[g] for g in images],
        k=k,
        n_original=[view.n_original[g] for g in images],
        seeds=lambda: [view.image_seeds[g] for g in images],
        signals={signal: view[signal][images] for signal in view.signals},
        sizes=view.sizes[images],
    )


def rounded(x: float) -> int:
    """Half up, as budgets are rounded."""
    return math.floor(x + 0.5)


def geometric(n: int, k: int, stage: int, stages: int) -> int:
    """Tokens behind stage 1 .. `stages` when each keeps the same share and the last leaves k of n."""
    return k if stage == stages else max(k, rounded(n * (k / n) ** (stage / stages)))


def inner_layers(layers: Sequence[int | float], depth: int) -> list[int]:
    """Distinct layers >= 1 from indices or fractions of the depth, ascending (shallow encoders collapse some)."""
    return sorted({max(1, resolve_layer(layer, depth, "layers")) for layer in layers})

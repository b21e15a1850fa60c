"""The decision as a value: which tokens stay, and what is merged into them with which weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtprune import ops
from vtprune.errors import VTPruneError
from vtprune.finite import check_finite


@dataclass(frozen=True)
class Selection:
    """Kept tokens of G images with N tokens each, and optionally where the others go.

    Attributes:
        index: one ascending int64 tensor [K_g] per image; counts may differ between images.
        into: [G, N] int64 slot (0 .. K_g - 1) that every token is added to, -1 for discarded tokens;
            None when nothing is merged.
        weight: [G, N] coefficients of that sum, used as they are.
        mix: one [K_g, N] matrix per image instead of `into` and `weight`, where a token is added to several slots:
            survivor s becomes sum_j mix[s, j] x_j.
        sources: per image, the images whose tokens, one image after the other, are the columns of its `mix`,
            [K_g, len(sources[g]) N]: so frames of a clip take up tokens of each other. None: columns are its own tokens.

    Raises:
        VTPruneError: `sources` fit no `mix`.
    """

    index: tuple[Tensor, ...]
    into: Tensor | None = None
    weight: Tensor | None = None
    mix: tuple[Tensor, ...] | None = None
    sources: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.sources is None:
            return
        images = range(len(self.index))
        if self.mix is None or not len(self.sources) == len(self.mix) == len(images):
            raise VTPruneError(
                f"sources={self.sources} need a matrix in `mix` for each of {len(images)} images."
            )
        for g, (of, m) in enumerate(zip(self.sources, self.mix, strict=True)):
            if not of or not all(s in images for s in of) or m.shape[-1] % len(of):
                raise VTPruneError(
                    f"image {g}: the {m.shape[-1]} columns of `mix` are not the tokens of images {of}; "
                    f"name images 0 to {len(images) - 1}, each with N columns."
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept tokens per image."""
        return tuple(len(i) for i in self.index)

    @property
    def merges(self) -> bool:
        """Whether survivors take up other tokens."""
        return self.into is not None or self.mix is not None

    @classmethod
    def of(cls, index: Tensor) -> Selection:
        """From equal counts: index [G, K], any order; sorted here so that raster order survives."""
        return cls(tuple(index.sort(-1).values.unbind(0)))

    @classmethod
    def topk(cls, scores: Tensor, k: int) -> Selection:
        """The k largest scores [G, N] of every image, ties going to the lower index.

        Raises:
            NonFiniteScoresError: a score is NaN.
        """
        return cls.of(topk(scores, k))

    @classmethod
    def where(cls, mask: Tensor) -> Selection:
        """From a bool mask [G, N]; counts may differ (reading them synchronises the device)."""
        return cls(tuple(row.nonzero()[:, 0] for row in mask))

    @classmethod
    def everything(cls, n_images: int, n_tokens: int, device: torch.device) -> Selection:
        """Keeps all tokens."""
        return cls(tuple(torch.arange(n_tokens, device=device) for _ in range(n_images)))

    def image(self, g: int) -> Selection:
        """The part that concerns image g, as a selection of one image.

        Raises:
            VTPruneError: it takes up tokens of other images, so that it is none by itself.
        """
        if self.sources is not None and self.sources[g] != (g,):
            raise VTPruneError(
                f"image {g} takes up tokens of images {self.sources[g]} and cannot be cut out of the selection; "
                "vtprune.scoring.together() joins and orders whole selections."
            )
        if self.mix is not None:
            return Selection((self.index[g],), mix=(self.mix[g],))
        if self.into is None or self.weight is None:
            return Selection((self.index[g],))
        return Selection((self.index[g],), self.into[g : g + 1], self.weight[g : g + 1])

    @property
    def padded(self) -> Tensor:
        """[G, K_max] `index`; shorter rows are filled up with their first entry."""
        if len(set(self.counts)) == 1:
            return torch.stack(self.index)
        index = pad_sequence(list(self.index), batch_first=True, padding_value=-1)
        return torch.where(index < 0, index[:, :1], index)

    def index_of(self, names: Tensor) -> tuple[Tensor, ...]:
        """Per image the names of the kept tokens; names [G, N] of all of them."""
        return tuple(row[:k] for row, k in zip(names.gather(1, self.padded), self.counts, strict=True))

    def dropped(self, names: Tensor) -> tuple[Tensor, ...]:
        """Per image the names of the tokens that are not kept; names [G, N] of all of them. Waits for no device."""
        index = self.padded
        kept = torch.zeros(names.shape, dtype=torch.uint8, device=index.device).scatter(1, index, 1)
        order = kept.sort(dim=1, stable=True).indices
        n = names.shape[1]
        return tuple(row[: n - k] for row, k in zip(names.gather(1, order), self.counts, strict=True))

    def apply(self, x: Tensor) -> Tensor:
        """Applies a selection of one image to its tokens.

        Args:
            x: [N, D].

        Returns:
            [K, D].

        Raises:
            VTPruneError: it is a selection of several images.
        """
        if len(self.index) != 1:
            raise VTPruneError(f"apply() works on one image, this selection holds {len(self.index)}")
        return self.apply_all(x[None])[0]

    def apply_all(self, x: Tensor) -> tuple[Tensor, ...]:
        """Applies it to the tokens of all images at once.

        Args:
            x: [G, N, D].

        Returns:
            [K_g, D] per image.
        """
        if self.mix is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            rows = {of: torch.cat([x[s] for s in of]).to(wide) for of in {*self._sources}}
            return tuple(
                (m.to(wide) @ rows[of]).to(x.dtype) for m, of in zip(self.mix, self._sources, strict=True)
            )
        if self.into is None or self.weight is None:
            out = ops.gather_tokens(x, self.padded)
        else:
            out = ops.merge_tokens(x, self.into, self.weight, max(self.counts))
        return tuple(rows[:k] for rows, k in zip(out, self.counts, strict=True))

    def sizes(self, before: Tensor) -> tuple[Tensor, ...]:
        """How many original tokens every survivor stands for.

        Args:
            before: [G, N] how many the tokens stood for. A token in several slots is shared out by its coefficients.

        Returns:
            [K_g] per image.
        """
        if self.mix is not None:
            total = torch.zeros_like(before)
            for m, of in zip(self.mix, self._sources, strict=True):
                for s, column in zip(of, m.sum(0).split(before.shape[1]), strict=True):
                    total[s] += column
            share = before / total.clamp(min=1e-12)
            return tuple(
                m.to(share) @ torch.cat([share[s] for s in of])
                for m, of in zip(self.mix, self._sources, strict=True)
            )
        if self.into is None:
            return self.index_of(before)
        slots = max(self.counts)
        into = self.into.where(self.into >= 0, slots)
        summed = before.new_zeros(len(before), slots + 1).scatter_add(1, into, before)
        return tuple(row[:k] for row, k in zip(summed, self.counts, strict=True))

    @property
    def _sources(self) -> tuple[tuple[int, ...], ...]:
        return self.sources or tuple((g,) for g in range(len(self.index)))


@dataclass(frozen=True)
class HeadSelection:
    """Which attention heads of R rows speak on.

    Attributes:
        keep: [R, H] bool.
    """

    keep: Tensor

    @classmethod
    def topk(cls, scores: Tensor, k: int, alive: Tensor) -> HeadSelection:
        """The k largest scores [R, H] of every row among its `alive` heads [R, H], ties going to the lower index.

        Raises:
            NonFiniteScoresError: a score is NaN.
        """
        best = topk(scores.masked_fill(~alive, float("-inf")), k)
        return cls(torch.zeros_like(alive).scatter(1, best, True) & alive)


def topk(scores: Tensor, k: int) -> Tensor:
    """Indices [G, k] of the k largest scores [G, N], best first, ties going to the lower index."""
    check_finite(scores)
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def merged(index: Tensor, target: Tensor, weight: Tensor) -> Selection:
    """A selection that keeps `index` and adds every other token to the kept token `target` points at.

    Args:
        index: [G, K] kept tokens.
        target: [G, N] for each token the kept token (original index) it is added to; kept tokens point at
            themselves, -1 discards.
        weight: [G, N] coefficients.
    """
    index = index.sort(-1).values
    slot = target.new_full(target.shape, -1).scatter(
        1, index, torch.arange(index.shape[1], device=index.device).expand_as(index)
    )
    into = torch.where(target >= 0, slot.gather(1, target.clamp(min=0)), target)
    return Selection(tuple(index.unbind(0)), into, weight)

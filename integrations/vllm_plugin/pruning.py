"""Removes tokens between vLLM's vision encoders and its language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.deciding import Candidates, decide
from vtprune.engine.encoder import EncoderEngine
from vtprune.engine.journal import Journal
from vtprune.errors import InertPruningError, UnsupportedCallError
from vtprune.finite import Check, answer
from vtprune.integrations.base import Encoding, FeatureCall, Rows, Unit, VisionTower
from vtprune.integrations.vllm_plugin.settings import Pruning
from vtprune.method import Signal, Stage


class _Journal(Journal):
    """Hooks for vLLM's linear layers, which return (output, bias): a hook sees, and may replace, the output."""

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], always: bool = False, first: bool = False
    ) -> None:
        def plain(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return hook(module, args, kwargs, output)
            changed = hook(module, args, kwargs, output[0])
            return None if changed is None else (changed, *output[1:])

        super().hook(module, plain, always, first)


class Pruner:
    """Prunes what one vision encoder in vLLM makes of pictures.

    Stages in and behind the encoder are those of vtprune's engine, by hooks. Pruned features are put back to full length
    behind the projector, so that vLLM's own packing of tiles and newlines sees what it expects; what was pruned is left
    out of the result.

    Args:
        tower: where the tokens are.
        pruning: what to do.

    Attributes:
        ragged: whether pictures of a batch may have different numbers of tokens within the encoder, which vLLM's cannot.
        kept: of the last call, per encoder image the ascending indices of what is left in its grid as it is shown.
    """

    kept: Sequence[Tensor] = ()

    def __init__(self, tower: VisionTower, pruning: Pruning) -> None:
        self.pruning = pruning
        vision = [s for s in pruning.stages if s.site.kind in ("vit", "encoder")]
        self.stages = [s for s in pruning.stages if s.site.kind == "projector"]
        self.ragged = any(s.site.kind == "vit" and s.keep is None for s in vision)
        signals: dict[Signal, str] = {}
        for stage in pruning.stages:
            for signal in stage.needs:
                signals.setdefault(signal, str(stage.site))
        self.engine = EncoderEngine([tower], vision, signals, owner=0, finish=None)
        self.journal = _Journal()
        self.engine.attach(self.journal)
        self.checks: list[Check] = []

    def __call__(
        self, embed: Callable[[], Sequence[Tensor] | Tensor], call: FeatureCall | None
    ) -> list[Tensor]:
        """Embeds pictures and leaves out what is pruned.

        Args:
            embed: vLLM's own way from pixels to one [n, D] per picture.
            call: what the encoder has to know beside the pixels.

        Returns:
            [k, D] per picture, separators included.

        Raises:
            InertPruningError: the encoder ran in a way that passed the hooks by.
            UnsupportedCallError: a method kept another number of tokens than was announced.
            NonFiniteScoresError: scores were NaN, maybe those of an earlier call.
        """
        answer(self.checks, wait=False)
        self.journal.check()
        self.engine.history(restart=True)
        self.engine.local.call = call
        try:
            full = list(embed())
            runs = list(self.engine.history())
        finally:
            self.engine.local.call = None
            self.engine.history(restart=True)  # measured signals need not outlive the call
        if not full and not runs:
            return []
        if len(runs) != 1:
            raise InertPruningError(
                f"the vision encoder ran {len(runs)} times past vtprune's hooks for one call"
            )
        (encoding,) = runs
        self.engine.check(encoding)
        pruned = self._behind_projector(encoding, full)
        self.checks += encoding.checks
        return pruned

    def _behind_projector(self, encoding: Encoding, full: list[Tensor]) -> list[Tensor]:
        tokens = _Projected(encoding, full)
        for stage in self.stages:
            tokens.apply(stage)
        tokens.check(self.pruning)
        self.kept = tokens.alive
        return tokens.rows()


class _Projected(Candidates):
    """The tokens of pictures as the language model is about to see them.

    Args:
        encoding: the encoder run.
        full: per picture [n, D], newline and separator tokens included; where tiles are separate encoder images, all tiles
            of a picture one after the other.
    """

    def __init__(self, encoding: Encoding, full: list[Tensor]) -> None:
        self.encoding, self.checks, self.full = encoding, encoding.checks, full
        self.units = list(encoding.units())
        self.layouts = [unit.layout for unit in self.units]
        self.alive = [encoding.shown(unit, encoding.alive) for unit in self.units]
        self.places = self._places()

    def _places(self) -> list[tuple[int, Tensor]]:
        """Per unit its picture, and the rows [n] of its tokens there."""
        if self.encoding.packing is not None:
            return [(unit.image, unit.slots) for unit in self.units]
        lengths = [len(rows) for rows in self.full]
        places, picture, first = [], 0, 0
        for unit in self.units:
            if first == lengths[picture]:
                picture, first = picture + 1, 0
            places.append((picture, unit.slots + first))
            first += unit.layout.n_tokens
        if first != lengths[picture] or picture + 1 != len(lengths):
            raise UnsupportedCallError(
                f"the encoder made {[u.layout.n_tokens for u in self.units]} tokens, vLLM pictures of {lengths}"
            )
        return places

    @property
    def counts(self) -> list[int]:  # type: ignore[override]
        return [len(alive) for alive in self.alive]

    def _some(self, images: Sequence[int]) -> list[Unit]:
        return [self.units[i] for i in images]

    def index(self, images: Sequence[int]) -> Tensor:
        return torch.stack([self.alive[i] for i in images])

    def features(self, images: Sequence[int]) -> Tensor:
        return torch.stack([self._features(i) for i in images])

    def _features(self, image: int) -> Tensor:
        picture, rows = self.places[image]
        return self.full[picture][rows[self.alive[image]]]

    def signal(self, signal: Signal, images: Sequence[int]) -> Rows:
        whole = all(len(self.alive[i]) == self.layouts[i].n_tokens for i in images)
        tokens = None if whole else [self.alive[i] for i in images]
        return self.encoding.unit_signals(signal, self._some(images), tokens)

    def seed(self, image: int) -> int:
        return self.encoding.seeds()[self.units[image].number]

    def apply(self, stage: Stage) -> None:
        """Lets a stage decide and carries it out."""
        for decision in decide(stage, self):
            selection, images = decision.selection, decision.images
            left = selection.index_of(self.index(images))
            values = selection.apply_all(self.features(images)) if selection.merges else None
            for g, image in enumerate(images):
                self.alive[image] = left[g]
                if values is not None:
                    picture, rows = self.places[image]
                    self.full[picture] = self.full[picture].index_put((rows[left[g]],), values[g])

    def check(self, pruning: Pruning) -> None:
        """Raises UnsupportedCallError unless every unit kept as many tokens as its placeholders say."""
        want = [pruning.left(layout.n_tokens) for layout in self.layouts]
        if self.counts != want:
            raise UnsupportedCallError(
                f"method {pruning.method.key!r} kept {self.counts} tokens where {want} were announced to vLLM, which sizes "
                "prompts beforehand; use a method with a fixed count"
            )

    def rows(self) -> list[Tensor]:
        """[k, D] per picture: separators and what is left."""
        keep = [torch.ones(len(rows), dtype=torch.uint8, device=rows.device) for rows in self.full]
        left = [len(rows) for rows in self.full]
        for image, (picture, rows) in enumerate(self.places):
            keep[picture][rows] = 0
            keep[picture][rows[self.alive[image]]] = 1
            left[picture] -= len(rows) - len(self.alive[image])
        # Sorting instead of reading the mask: nothing waits for the device.
        order = [k.sort(descending=True, stable=True).indices[:n] for k, n in zip(keep, left, strict=True)]
        return [rows[index] for rows, index in zip(self.full, order, strict=True)]

"""A forward pass of a stock model in which visual tokens fade out instead of leaving, so that gradients reach what decides.

A token with mask m in [0, 1] adds log(m + 1e-6) to its logit wherever it is a key. Positions stay, so with masks of 0 and 1
the pass equals that of a patched model with original positions up to that 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.integrations import integrate
from vtprune.integrations.base import AttentionTap
from vtprune.integrations.towers import BatchedViT
from vtprune.method import ModelFacts

from ..prompts import EvaluationError
from ..shrink import Inputs

EPSILON = 1e-6


@dataclass(frozen=True)
class Seen:
    """What an attention layer shows of visual tokens.

    Attributes:
        queries, keys: [B, H, N, d] and [B, H_kv, N, d], rotated (language model only).
        attention: [B, H, T, N] of the rows that ask: [CLS] alone, or all text of the prompt behind the picture, other rows
            being zero.
        norms: [B, H, N] of the heads' outputs (vision encoder only).
    """

    attention: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    norms: Tensor | None = None


@dataclass
class Places:
    """Where a method decides, and what it is asked there: the mask [B, N] from there on.

    Attributes:
        vit: ViT layer -> what decides at its input, from the layer before.
        features: what decides behind the encoder, from features [B, N, D].
        decoder: decoder layer -> what decides behind it.
    """

    vit: Mapping[int, Callable[[Seen], Tensor]] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None
    decoder: Mapping[int, Callable[[Seen], Tensor]] = field(default_factory=dict)


class Fading:
    """Runs one model with fading tokens.

    Args:
        model: an unpatched vision-language model that shows each picture as one run of N tokens.

    Raises:
        UnsupportedModelError: another kind of model.
        AlreadyPatchedError: it carries a patch.
    """

    def __init__(self, model: nn.Module) -> None:
        vtprune.patch(model, "keep-all").remove()
        integration = integrate(model)
        tower = integration.towers[0] if len(integration.towers) == 1 else None
        if integration.decoder is None or not isinstance(tower, BatchedViT) or integration.facts.mrope:
            raise UnsupportedModelError(
                f"parameters cannot be trained on a {integration.facts.name}: training needs a vision-language model "
                "with one encoder of a fixed size and one run of tokens per picture, such as LLaVA."
            )
        self.model, self.tower, self.decoder = model, tower, integration.decoder
        self.facts: ModelFacts = integration.facts
        self.placeholder = integration.placeholders["image"]

    def columns(self, inputs: Inputs) -> Tensor:
        """[B, N] places of the visual tokens in their rows.

        Raises:
            EvaluationError: rows differ in their number.
        """
        shown = inputs["input_ids"] == self.placeholder
        counts = set(shown.sum(1).tolist())
        if len(counts) != 1 or len(shown) != len(inputs["pixel_values"]):
            raise EvaluationError(
                f"training needs one picture of the same number of tokens in every row, got {sorted(counts)} tokens."
            )
        return shown.nonzero()[:, 1].view(len(shown), -1)

    def __call__(self, inputs: Inputs, asking: Tensor, places: Places) -> Tensor:
        """Logits [B, L, V].

        Args:
            inputs: of the model; one picture per row.
            asking: [B, L] bool, text of the prompt (not of the answer) behind the picture.
            places: where and how masks come about.
        """
        with self._hooked(self.columns(inputs), asking, places):
            plain: Any = self.model
            logits: Tensor = plain(**inputs, use_cache=False).logits
        return logits

    @contextmanager
    def _hooked(self, columns: Tensor, asking: Tensor, places: Places) -> Iterator[None]:
        with ExitStack() as stack:
            run = _Run(columns, asking, places)

            def on(module: nn.Module, hook: Callable[..., Any]) -> None:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

            def before(module: nn.Module, hook: Callable[..., Any]) -> None:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

            first = min(places.vit, default=len(self.tower.layers))
            for layer in range(first, len(self.tower.layers)):
                before(self.tower.layers[layer], run.vit_layer(layer, self.tower.prefix))
            for layer in places.vit:
                tap = self.tower.tap(layer - 1)
                assert tap.output is not None
                for i, projection in enumerate(tap.projections):
                    on(projection, run.capture(i))
                before(tap.output, run.capture_input)
                on(tap.module, run.vit_attention(tap, layer, self.tower.prefix))
            if places.features is not None:
                assert self.tower.projector is not None
                before(self.tower.projector, run.features)
            for layer, module in enumerate(self.decoder.layers):
                before(module, run.decoder_layer)
                if layer in places.decoder:
                    attention: Any = self.decoder.attention(layer)
                    for i, projection in enumerate(self.decoder.projections(attention)):
                        on(projection, run.capture(i))
                    on(module, run.decoder_attention(self.decoder.rotate, attention, layer))
            yield


class _Run:
    """Hooks and state of one forward pass."""

    def __init__(self, columns: Tensor, asking: Tensor, places: Places) -> None:
        self.columns, self.asking, self.places = columns, asking, places
        self.mask: Tensor | None = None  # [B, N]
        self.captured: dict[int, Tensor] = {}
        self.additive: Tensor | None = None  # [B, 1, L, L] of the running layer
        self.kwargs: dict[str, Any] = {}

    def capture(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self.captured[i] = output

        return hook

    def capture_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self.captured[-1] = args[0]

    def vit_layer(self, layer: int, prefix: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.mask is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            bias = self._bias(prefix).to(hidden.dtype)
            mask = bias.expand(-1, -1, hidden.shape[1], -1)
            if len(args) > 1:
                return (args[0], mask, *args[2:]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def vit_attention(self, tap: AttentionTap, layer: int, prefix: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            q, k, _ = tap.heads([self.captured[i] for i in range(len(tap.projections))], kwargs)
            logits = q[:, :, :1] @ k.transpose(2, 3) * tap.scale
            if self.mask is not None:
                logits = logits + self._bias(prefix)
            mixed = self.captured[-1].unflatten(-1, (q.shape[1], -1))[:, prefix:]
            seen = Seen(attention=logits.softmax(-1)[..., prefix:], norms=mixed.norm(dim=-1).transpose(1, 2))
            self.mask = self.places.vit[layer](seen)

        return hook

    def _bias(self, prefix: int) -> Tensor:
        """[B, 1, 1, prefix + N] to be added to logits of the encoder."""
        assert self.mask is not None
        return nn.functional.pad((self.mask + EPSILON).log(), (prefix, 0))[:, None, None]

    def features(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        assert self.places.features is not None
        self.mask = self.places.features(args[0])

    def decoder_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.additive = _additive(kwargs.get("attention_mask"), hidden)
        self.kwargs = kwargs
        if self.mask is None:
            return None
        logs = (self.mask + EPSILON).log().to(hidden.dtype)
        bias = hidden.new_zeros(hidden.shape[:2]).scatter(1, self.columns, logs)
        self.additive = self.additive + bias[:, None, None]
        return args, {**kwargs, "attention_mask": self.additive}

    def decoder_attention(
        self, rotate: Callable[..., Tensor], attention: Any, layer: int
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tables = self.kwargs["position_embeddings"]
            q, k = (
                self._heads(attention, name, self.captured[i], rotate, tables) for i, name in enumerate("qk")
            )
            assert self.additive is not None
            wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            rows = (q @ wide.transpose(2, 3) * attention.scaling + self.additive).softmax(-1)
            rows = rows * self.asking[:, None, :, None]
            places = self.columns[:, None, :, None]
            visual = rows.gather(3, self.columns[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1))
            here = [x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k)]
            self.mask = self.places.decoder[layer](Seen(visual, queries=here[0], keys=here[1]))

        return hook

    @staticmethod
    def _heads(attention: Any, name: str, x: Tensor, rotate: Callable[..., Tensor], tables: Any) -> Tensor:
        x = x.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return rotate(attention, (x if norm is None else norm.forward(x)).transpose(1, 2), *tables)


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The mask [B or 1, 1, L, L] that a decoder layer was given, to be added to logits."""
    length = hidden.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden.device).tril()
    if mask.dtype != torch.bool:
        return mask
    low = torch.finfo(hidden.dtype).min
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~mask, low)

"""Expected results by the slow and literal way, sharing no code with the library.

Everything here takes an *unpatched* model and the indices that a report claims to have kept. Rows are run one
by one, without padding and without a cache. What is pruned before the language model is cut out by hand; what
is pruned inside it stays in the sequence and is hidden by an explicit mask from then on.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

Inputs = Mapping[str, Tensor]
Merge = Callable[["Frame", Tensor, list[int]], Tensor]


@dataclass
class Frame:
    """One picture (or video frame) of a row, with what the stock encoder makes of it."""

    pixels: Tensor
    rows: int
    cols: int
    projected: Tensor
    columns: list[int]

    @property
    def n(self) -> int:
        """Tokens of the full grid."""
        return self.rows * self.cols


class Reference:
    """Judge of one stock vision-language model: LLaVA (CLIP, SigLIP) or Qwen2.5-VL."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decoder: Any = model.model.language_model
        self.qwen = hasattr(model.model, "visual")
        config: Any = model.config
        self.image_token = config.image_token_id
        self.video_token = getattr(config, "video_token_id", -1)

    # ------------------------------------------------------------------ rows

    def split(self, inputs: Inputs) -> list[dict[str, Tensor]]:
        """Every row of a batch as inputs of its own: no padding, its pictures only."""
        rows = []
        taken = {"image": 0, "video": 0, "image_pixels": 0, "video_pixels": 0}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            row = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            if not self.qwen:
                count = int((ids == self.image_token).sum()) // self.llava_tokens
                if count:
                    row["pixel_values"] = inputs["pixel_values"][taken["image"] : taken["image"] + count]
                taken["image"] += count
            else:
                row["mm_token_type_ids"] = (
                    (ids == self.image_token).int() + 2 * (ids == self.video_token).int()
                )[None]
                for kind, token, suffix in (
                    ("image", self.image_token, ""),
                    ("video", self.video_token, "_videos"),
                ):
                    missing, grids, pixels = int((ids == token).sum()), [], 0
                    while missing:
                        grid = inputs[f"{kind}_grid_thw"][taken[kind]]
                        missing -= int(grid.prod()) // 4
                        pixels += int(grid.prod())
                        grids.append(grid)
                        taken[kind] += 1
                    if grids:
                        start = taken[f"{kind}_pixels"]
                        row[f"pixel_values{suffix}"] = inputs[f"pixel_values{suffix}"][start : start + pixels]
                        row[f"{kind}_grid_thw"] = torch.stack(grids)
                        taken[f"{kind}_pixels"] += pixels
            rows.append(row)
        return rows

    @property
    def llava_tokens(self) -> int:
        """Tokens of one LLaVA picture."""
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def frames(self, row: Inputs) -> list[Frame]:
        """The pictures of one row in the order of their tokens."""
        ids = row["input_ids"][0].tolist()
        columns = [i for i, t in enumerate(ids) if t in (self.image_token, self.video_token)]
        if not columns:
            return []
        parts: list[tuple[Tensor, int, int, Tensor]] = []
        if not self.qwen:
            side = math.isqrt(self.llava_tokens)
            projected = self.model.get_image_features(row["pixel_values"]).pooler_output
            parts = [(p, side, side, f) for p, f in zip(row["pixel_values"], projected, strict=True)]
        else:
            queues: dict[int, list[list[tuple[Tensor, int, int, Tensor]]]] = {}
            for token, pixel_key, grid_key, encode in (
                (self.image_token, "pixel_values", "image_grid_thw", self.model.get_image_features),
                (self.video_token, "pixel_values_videos", "video_grid_thw", self.model.get_video_features),
            ):
                if pixel_key not in row:
                    continue
                features = torch.cat(list(encode(row[pixel_key], row[grid_key]).pooler_output))
                at, queues[token] = 0, []
                for t, h, w in row[grid_key].tolist():
                    item = []
                    for _ in range(t):
                        pixels = row[pixel_key][at : at + h * w]
                        item.append((pixels, h // 2, w // 2, features[at // 4 : (at + h * w) // 4]))
                        at += h * w
                    queues[token].append(item)
            position = 0
            while position < len(columns):
                item = queues[ids[columns[position]]].pop(0)
                parts += item
                position += sum(h * w for _, h, w, _ in item)
        frames, position = [], 0
        for pixels, h, w, features in parts:
            frames.append(Frame(pixels, h, w, features, columns[position : position + h * w]))
            position += h * w
        return frames

    def positions(self, row: Inputs, n: int) -> Tensor:
        """Original position ids [P, n] of a row whose text was continued to n tokens (P = 3 for M-RoPE)."""
        ids = row["input_ids"]
        first = torch.arange(ids.shape[1])[None]
        if self.qwen and ("image_grid_thw" in row or "video_grid_thw" in row):
            first = self.model.model.get_rope_index(
                ids,
                mm_token_type_ids=row["mm_token_type_ids"],
                image_grid_thw=row.get("image_grid_thw"),
                video_grid_thw=row.get("video_grid_thw"),
                attention_mask=row["attention_mask"],
            )[0][:, 0]
        more = first.max() + 1 + torch.arange(n - ids.shape[1])
        return torch.cat([first, more.expand(len(first), -1)], 1)

    # ------------------------------------------------------------------ the vision encoder by hand

    def clip_run(
        self, pixels: Tensor, drops: Mapping[int, list[int]] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Runs a CLIP or SigLIP tower layer by layer on one picture; `drops`: layer -> indices that stay."""
        tower: Any = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        hidden = tower.embeddings(pixels[None])
        has_cls = hidden.shape[1] == self.llava_tokens + 1
        if hasattr(tower, "pre_layrnorm"):
            hidden = tower.pre_layrnorm(hidden)
        alive = list(range(self.llava_tokens))
        used = len(tower.encoder.layers) + 1 + self.model.config.vision_feature_layer  # e.g. all but the last
        for number, layer in enumerate(tower.encoder.layers[:used]):
            if drops and number in drops:
                rows = [alive.index(i) + has_cls for i in drops[number]]
                hidden = hidden[:, [0] * has_cls + rows]
                alive = list(drops[number])
            hidden = layer(hidden, None)
        return hidden[0, int(has_cls) :], alive

    def qwen_run(
        self, frame: Frame, drops: Mapping[int, list[int]] | None = None, tap: int | None = None
    ) -> tuple[Tensor, list[int], dict[str, np.ndarray]]:
        """Runs Qwen2.5-VL's ViT window by window on one frame; everything in raster order of merged tokens.

        Returns:
            Group features [n, 4, D] behind the last block, living tokens, and signals of block `tap`.
        """
        visual: Any = self.model.model.visual
        grid = torch.tensor([[1, 2 * frame.rows, 2 * frame.cols]])
        hidden = visual.patch_embed(frame.pixels)
        places = get_vision_position_ids(grid, 2)
        if "hidden_states" in inspect.signature(visual.rotary_pos_emb.forward).parameters or hasattr(
            visual.rotary_pos_emb, "config"
        ):
            cos, sin = visual.rotary_pos_emb(hidden, places)
        else:  # transformers < 5.20: angles, once for both halves
            angles = visual.rotary_pos_emb(places).repeat(1, 2)
            cos, sin = angles.cos(), angles.sin()
        order, bounds = get_vision_window_index(grid, 2, visual.window_size, visual.patch_size)
        windows = [
            [order[j // 4].item() for j in range(a, b, 4)] for a, b in itertools.pairwise(bounds.tolist())
        ]
        hidden, cos, sin = (x.reshape(frame.n, 4, -1) for x in (hidden, cos, sin))
        alive = list(range(frame.n))
        signals: dict[str, np.ndarray] = {}
        for number, block in enumerate(visual.blocks):
            if drops and number in drops:
                alive = list(drops[number])
            groups = [alive] if number in visual.fullatt_block_indexes else windows
            groups = [[i for i in g if i in alive] for g in groups]
            if number == tap:
                signals = self._qwen_signals(block, hidden, cos, sin, [g for g in groups if g], frame.n)
            fresh = hidden.clone()
            for group in groups:
                if group:
                    x, c, s = (y[group].flatten(0, 1) for y in (hidden, cos, sin))
                    ends = torch.tensor([0, len(x)], dtype=torch.int32)
                    out = block(x, cu_seqlens=ends, position_embeddings=(c, s), max_seqlen=len(x))
                    fresh[group] = out.view(len(group), 4, -1)
            hidden = fresh
        return hidden[alive], alive, signals

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        """The second half negated, then the first: what rotary embeddings multiply by the sine."""
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    @staticmethod
    def _qwen_signals(
        block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, groups: list[list[int]], n: int
    ) -> dict[str, np.ndarray]:
        heads = block.attn.num_heads
        received, keys = np.zeros((heads, n)), np.zeros((n, block.attn.head_dim))
        for group in groups:
            x, c, s = (y[group].flatten(0, 1) for y in (hidden, cos, sin))
            q, k, _ = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, -1).double().unbind(1)
            q, k = (y * c[:, None] + Reference.turned(y) * s[:, None] for y in (q, k))
            weights = torch.einsum("qhd,khd->hqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
            share = weights.mean(1).detach().numpy()  # [heads, keys], mean over the queries that can see it
            mean_keys = k.mean(1).detach().numpy()
            for j, token in enumerate(group):
                received[:, token] = share[:, 4 * j : 4 * j + 4].sum(1)
                keys[token] = mean_keys[4 * j : 4 * j + 4].mean(0)
        return {"received": received, "keys": keys}

    def signals(self, frame: Frame, layer: int) -> dict[str, np.ndarray]:
        """Attention [heads, n] ("cls", "received") and head-mean keys [n, d] of one stock ViT layer."""
        if self.qwen:
            return self.qwen_run(frame, tap=layer)[2]
        tower = copy.deepcopy(self.model.model.vision_tower)
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            out = tower(frame.pixels[None], output_attentions=True, output_hidden_states=True)
        weights = out.attentions[layer][0].double().numpy()
        block: Any = getattr(tower, "vision_model", tower).encoder.layers[layer]
        with torch.no_grad():
            keys = block.self_attn.k_proj(block.layer_norm1(out.hidden_states[layer]))[0]
        keys = keys.view(len(keys), weights.shape[0], -1).mean(1).double().numpy()
        skip = weights.shape[-1] - frame.n  # 1 with [CLS]
        found = {"received": weights.mean(1)[:, skip:], "keys": keys[skip:]}
        if skip:
            found["cls"] = weights[:, 0, skip:]
        return found

    @property
    def used_vit_layers(self) -> int:
        """ViT layers whose output reaches the features."""
        if self.qwen:
            return len(self.model.model.visual.blocks)
        return self.model.config.vision_config.num_hidden_layers + 1 + self.model.config.vision_feature_layer

    def project(self, features: Tensor) -> Tensor:
        """The stock projector (Qwen: merger) on living tokens."""
        if self.qwen:
            return self.model.model.visual.merger(features.flatten(0, 1))
        return self.model.model.multi_modal_projector(features)

    def frame_features(
        self, frame: Frame, kept: Mapping[str, Any], merge: Merge | None
    ) -> tuple[Tensor, list[int]]:
        """What the language model is given of a frame, and which tokens that is."""
        before = {site: [int(i) for i in idx] for site, idx in kept.items() if not site.startswith("decoder")}
        if not before:
            return frame.projected, list(range(frame.n))
        drops = {int(site[4:-1]): idx for site, idx in before.items() if site.startswith("vit[")}
        if not drops and merge is None:
            final = list(before.values())[-1]
            return frame.projected[final], final
        if self.qwen:
            features, alive, _ = self.qwen_run(frame, drops)
        else:
            features, alive = self.clip_run(frame.pixels, drops)
        if "encoder" in before:
            if merge is not None:
                features = merge(frame, features, before["encoder"])
            else:
                features = features[[alive.index(i) for i in before["encoder"]]]
            alive = before["encoder"]
        projected = self.project(features)
        if "projector" in before:
            projected = projected[[alive.index(i) for i in before["projector"]]]
            alive = before["projector"]
        return projected, alive

    # ------------------------------------------------------------------ the language model

    def look(
        self, row: Inputs, kept: Sequence[Mapping[str, Any]], merge: Merge | None = None
    ) -> list[tuple[Frame, Tensor, list[int]]]:
        """Pictures of a row with the features that reach the language model."""
        frames = self.frames(row)
        assert len(frames) == len(kept), "the report lists another number of pictures"
        return [(f, *self.frame_features(f, sites, merge)) for f, sites in zip(frames, kept, strict=True)]

    def row_logits(
        self,
        row: Inputs,
        kept: Sequence[Mapping[str, Any]],
        dense_sites: Sequence[str] = (),
        merge: Merge | None = None,
        more: Sequence[int] = (),
        seen: Sequence[tuple[Frame, Tensor, list[int]]] | None = None,
    ) -> Tensor:
        """Logits [n, V] that the columns of one row must show.

        Args:
            row: inputs of one row, see :meth:`split`.
            kept: per picture of the row: site -> surviving indices.
            dense_sites: sites whose survivors are renumbered.
            merge: recomputes merged features at the encoder.
            more: text tokens that continue the row.
            seen: what :meth:`look` returned, if it was called already.
        """
        ids = torch.cat([row["input_ids"][0], torch.tensor(list(more), dtype=torch.long)])
        n = len(ids)
        seen = self.look(row, kept, merge) if seen is None else seen
        embeds = self.decoder.embed_tokens(ids)
        vectors = list(embeds.unbind(0))
        gone: dict[int, str] = {}  # column -> site at which it vanishes
        for (frame, features, alive), sites in zip(seen, kept, strict=True):
            for vector, i in zip(features, alive, strict=True):
                vectors[frame.columns[i]] = vector
            living = set(range(frame.n))
            for site, index in sites.items():
                stay = {int(i) for i in index}
                assert stay <= living, f"{site} revives tokens"
                for i in living - stay:
                    gone[frame.columns[i]] = site
                living = stay
        original = self.positions(row, n)
        late = {c: int(s[8:-1]) for c, s in gone.items() if s.startswith("decoder")}
        short = [c for c in range(n) if c not in gone or c in late]

        def position_ids(layer: int) -> Tensor:
            shifted = []
            for c in short:
                before = [
                    g for g, s in gone.items() if g < c and s in dense_sites and late.get(g, 0) <= layer
                ]
                shifted.append(original[:, c] - len(before))
            found = torch.stack(shifted, 1)  # [P, len(short)]
            return found[:, None].expand(3, 1, -1) if self.qwen else found[:1]

        hidden = torch.stack([vectors[c] for c in short])[None]
        if not late:
            hidden = self.decoder(
                inputs_embeds=hidden,
                position_ids=position_ids(0),
                attention_mask=torch.ones(1, len(short), dtype=torch.long),
                use_cache=False,
            ).last_hidden_state
        else:
            for number, layer in enumerate(self.decoder.layers):
                mask = torch.full((len(short), len(short)), torch.finfo(hidden.dtype).min, dtype=hidden.dtype)
                for i in range(len(short)):
                    for j in range(i + 1):
                        if i == j or late.get(short[j], 10**9) > number:
                            mask[i, j] = 0.0
                rotary = self.decoder.rotary_emb(hidden, position_ids(number))
                hidden = layer(
                    hidden, attention_mask=mask[None, None], position_embeddings=rotary, use_cache=False
                )
            hidden = self.decoder.norm(hidden)
        logits = self.model.lm_head(hidden)[0]
        shown, last = [], None
        for c in range(n):
            if c not in gone:
                last = logits[short.index(c)]
            shown.append(last if last is not None else torch.full_like(logits[0], float("nan")))
        return torch.stack(shown)

    def greedy(self, row: Inputs, steps: int, start: Sequence[int] = (), **how: Any) -> list[int]:
        """Greedy text after `start` by re-running everything for every token."""
        text = list(start)
        banned = list(self.model.generation_config.suppress_tokens or [])
        with torch.no_grad():
            seen = self.look(row, how["kept"], how.get("merge"))
            for _ in range(steps):
                scores = self.row_logits(row, more=text, seen=seen, **how)[-1].clone()
                scores[banned] = -float("inf")
                text.append(int(scores.argmax()))
        return text[len(start) :]


# ---------------------------------------------------------------------- decisions, literally


def budget(keep: float, n: int) -> int:
    """Tokens to keep of n."""
    wanted = keep if isinstance(keep, int) else max(1, math.floor(keep * n + 0.5))
    return min(wanted, n)


def best(scores: np.ndarray, k: int) -> list[int]:
    """The k best, ties to the lower index, in raster order."""
    remaining = list(range(len(scores)))
    chosen = []
    for _ in range(k):
        winner = max(remaining, key=lambda i: (scores[i], -i))
        remaining.remove(winner)
        chosen.append(winner)
    return sorted(chosen)


def stride_decision(n: int, k: int) -> list[int]:
    """Token floor((i + 1/2) n / k) for every i."""
    return [math.floor((i + 0.5) * n / k) for i in range(k)]


def vtc_cls_decision(judge: Reference, frame: Frame, k: int, first: int, scorer: str) -> list[int]:
    """Attention of [CLS] (or received), head mean, summed over layers from `first` to the last used one."""
    scores = np.zeros(frame.n)
    for layer in range(first, judge.used_vit_layers):
        weights = judge.signals(frame, layer)[scorer]
        for head in weights:
            scores += head / len(weights)
    return best(scores, k)


def visionzip_plan(
    judge: Reference, frame: Frame, k: int, contextual: float, scorer: str
) -> dict[int, list[int]]:
    """Kept token -> the tokens whose mean is added to it (empty for dominant tokens)."""
    signals = judge.signals(frame, judge.used_vit_layers - 1)
    return visionzip_from(signals[scorer], signals["keys"], k, contextual)


def visionzip_from(weights: np.ndarray, keys: np.ndarray, k: int, contextual: float) -> dict[int, list[int]]:
    """The plan from attention [heads, n] and head-mean keys [n, d]."""
    n = weights.shape[1]
    c = min(round(contextual * k), n - k)
    dominant = best(weights.sum(0), k - c)
    rest = [i for i in range(n) if i not in dominant]
    plan: dict[int, list[int]] = {i: [] for i in dominant}
    if c == 0:
        return plan
    step = len(rest) // c
    targets = [rest[i * step] for i in range(c)]
    plan |= {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            cosines = [keys[i] @ keys[t] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[t]) for t in targets]
            plan[targets[int(np.argmax(cosines))]].append(i)
    return plan


def merge_by_plan(features: Tensor, plan: Mapping[int, list[int]]) -> Tensor:
    """Kept tokens in raster order, each with the mean of its members added."""
    out = []
    for token in sorted(plan):
        value = features[token]
        if plan[token]:
            value = value + sum(features[i] for i in plan[token]) / len(plan[token])
        out.append(value)
    return torch.stack(out)


def divprune_decision(features: Tensor, k: int) -> list[int]:
    """Greedy max-min cosine distance."""
    x = features.detach().double().numpy()
    n = len(x)
    distance = [
        [1 - x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in range(n)] for i in range(n)
    ]
    if k == n:
        return list(range(n))
    chosen = [max(range(n), key=lambda i: (min(distance[i][j] for j in range(n) if j != i), -i))]
    while len(chosen) < k:
        others = [i for i in range(n) if i not in chosen]
        chosen.append(max(others, key=lambda i: (min(distance[s][i] for s in chosen), -i)))
    return sorted(chosen)


def fastv_decisions(judge: Reference, row: Inputs, keep: float, layer: int) -> list[list[int]]:
    """Per picture: attention of the last prompt token in decoder layer `layer` - 1, mean over heads."""
    eager = copy.deepcopy(judge.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**row, output_attentions=True, use_cache=False).attentions[layer - 1][0]
    scores = weights[:, -1].double().mean(0).numpy()
    return [best(scores[f.columns], budget(keep, f.n)) for f in judge.frames(row)]


def text_attention(judge: Reference, row: Inputs, layer: int, **how: Any) -> np.ndarray:
    """Head-mean attention of the last prompt token in decoder layer `layer`, per surviving column in order.

    The model must compute attention eagerly; `how` says what was pruned before.
    """
    found: list[Tensor] = []
    attention = judge.decoder.layers[layer].self_attn
    handle = attention.register_forward_hook(lambda module, args, out: found.append(out[1]))
    with torch.no_grad():
        judge.row_logits(row, **how)
    handle.remove()
    return found[-1][0, :, -1].double().mean(0).numpy()


def clip_votes(
    judge: Reference, frame: Frame, drops: Mapping[int, list[int]], layers: Sequence[int]
) -> np.ndarray:
    """[CLS] attention summed over layers of a tower that drops tokens on its way; dead tokens get -1."""
    tower: Any = judge.model.model.vision_tower
    scores = np.zeros(frame.n)
    alive = list(range(frame.n))
    hidden = tower.pre_layrnorm(tower.embeddings(frame.pixels[None]))
    for number, block in enumerate(tower.encoder.layers[: judge.used_vit_layers]):
        if number in drops:
            hidden = hidden[:, [0, *(1 + alive.index(i) for i in drops[number])]]
            alive = drops[number]
        if number in layers:
            x, heads = block.layer_norm1(hidden)[0], block.self_attn.num_heads
            q, k = (
                f(x).view(len(x), heads, -1).double()
                for f in (block.self_attn.q_proj, block.self_attn.k_proj)
            )
            weights = torch.einsum("hd,khd->hk", q[0], k).mul(q.shape[-1] ** -0.5).softmax(-1).mean(0)
            for place, i in enumerate(alive):
                scores[i] += float(weights[1 + place])
        hidden = block(hidden, None)
    for i in set(range(frame.n)) - set(alive):
        scores[i] = -1
    return scores


# ---------------------------------------------------------------------- timm


def timm_run(
    model: Any, image: Tensor, drops: Mapping[int, list[int]], merge: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Stock blocks of a timm VisionTransformer on one image [3, H, W].

    Args:
        drops: block -> surviving patches at its input; block `len(blocks)` is behind the last one.
        merge: maps all patch tokens behind the last block to the kept ones.

    Returns:
        Features [prefix + kept, D] behind the norm, and the head's output.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image[None]))))
    prefix = model.num_prefix_tokens
    alive = list(range(x.shape[1] - prefix))
    for number, block in enumerate([*model.blocks, None]):
        if number in drops:
            if merge is not None and block is None:
                x = torch.cat([x[:, :prefix], merge(x[0, prefix:])[None]], 1)
            else:
                x = x[:, [*range(prefix), *(prefix + alive.index(i) for i in drops[number])]]
            alive = list(drops[number])
        if block is not None:
            x = block(x)
    x = model.norm(x)
    return x[0], model.forward_head(x)[0]

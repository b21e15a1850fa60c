"""The trained scorer of `mllm-select`: which frames of a clip hold the answer to a question."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtprune.errors import InvalidOptionError
from vtprune.methods import weights
from vtprune.video.clip import checked
from vtprune.video.embedding import Array, CLIPEmbedder, Embedder

FORMAT = "vtprune-frame-scorer 1"
NAME = "mllm-select"
TRAIN = "python -m vtprune.eval.training.frame_scorer --output FILE"
MOST_WORDS = 32  # of a question; more are not read
PADDING, UNKNOWN = 0, 1
REACH = 16  # frames; farther ones are told apart by their times only
WAVES = 4
FLAT = 0.02  # cosine; differences below it are not stretched
SAME = 0.99  # cosine of the probe's vectors; half precision stays above 0.999


class Block(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, dropout behind both.

    Args:
        width: of every token.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_mixing, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, S, width], bias [B, heads, S, S] added to the attention's logits -> [B, S, width]."""
        rows, length, width = x.shape
        qkv = self.qkv(self.before_mixing(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        x = x + self.dropout(self.mlp(self.before_mlp(x)))
        return x


class ScoreNetwork(nn.Module):
    """Frames, the question's words and a learned score query in one small transformer; one score per frame.

        z = sum_j g_j table[word_j] / (sqrt(width) max(1, sum_j g_j))            g_j = sigmoid(gate[word_j])
        c = P e . z, minus its mean over the clip, over sqrt(its variance + 0.02^2)
        frame i:  W [e_{i-1}; e_i; e_{i+1}] sqrt(D) + T waves((i + 1/2) / n) + F c_i   e: unit vectors; the ends repeat
        word j:   table[word] + place[j]
        query:    learned
        attention between frames i and j gets a bias by head and clamp(j - i, -16, 16)
        logit_i = w . [gelu(A LN(x_i) + B LN(x_query)); c_i] + b

    waves(t) = sin and cos of 2^f pi t for f = 0 .. 3, so that a time means the same whatever the number of frames.

    Source: M-LLM based video frame selection (two secondary accounts that agree; no code): visual tokens of all frames,
    the question and one learned score query at the end go through a language model, and an MLP on the query's hidden
    state of the last block but one gives all n scores. Ours, for want of that model: a transformer of two layers
    trained from scratch, one vector per frame, neighbours, times and the bias, the fit c, attention in all directions,
    the last block, and a head that reads query and frame together, so that n is free.

    Args:
        size: D, of the frames' vectors.
        words: rows of the word table, with those of padding and unknown words.
        width: of the transformer, a multiple of `heads`.
        layers: of the transformer.
        heads: of its attention.
    """

    def __init__(self, size: int, words: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.shape = {"size": size, "words": words, "width": width, "layers": layers, "heads": heads}
        self.frame, self.time = nn.Linear(3 * size, width), nn.Linear(2 * WAVES, width, bias=False)
        self.fit, self.fits = nn.Linear(size, width, bias=False), nn.Linear(1, width, bias=False)
        self.gate = nn.Embedding(words, 1)
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(MOST_WORDS, width)
        self.query = nn.Parameter(torch.randn(width) / 2)
        self.near = nn.Parameter(torch.zeros(heads, 2 * REACH + 1))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.of_frame, self.of_query = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width + 1, 1)

    def forward(self, vectors: Tensor, valid: Tensor, words: Tensor) -> Tensor:
        """Scores before the sigmoid; those of padding mean nothing.

        Args:
            vectors: [B, N, D] float.
            valid: [B, N] bool, False for padding, which follows the frames; at least one frame per row.
            words: [B, L] int64 rows of the word table, L <= 32, `PADDING` behind the question.

        Returns:
            [B, N].
        """
        rows, n, size = vectors.shape
        count = valid.sum(1, keepdim=True)
        index = torch.arange(n, device=vectors.device)
        after = torch.minimum(index + 1, count - 1)[..., None].expand(rows, n, size)
        around = torch.cat(
            [vectors[:, (index - 1).clamp(min=0)], vectors, vectors.gather(1, after)], -1
        ) * math.sqrt(size)
        angle = math.pi * ((index + 0.5) / count)[..., None] * 2.0 ** torch.arange(WAVES, device=index.device)
        frames = self.frame(around) + self.time(torch.cat([angle.sin(), angle.cos()], -1))
        fit = self.fitting(vectors, valid, words)[..., None]
        frames = frames + self.fits(fit)
        asked = self.word(words) + self.place.weight[: words.shape[1]]
        x = torch.cat([frames, asked, self.query.expand(rows, 1, -1)], 1)

        seen = torch.cat([valid, words != PADDING, valid.new_ones(rows, 1)], 1)
        bias = torch.zeros(rows, 1, 1, x.shape[1], device=x.device).masked_fill(
            ~seen[:, None, None], -math.inf
        )
        gap = (index - index[:, None]).clamp(-REACH, REACH) + REACH
        rest = x.shape[1] - n
        bias = bias + F.pad(self.near[:, gap], (0, rest, 0, rest))
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        hidden = F.gelu(self.of_frame(x[:, :n]) + self.of_query(x[:, -1:]))
        logits: Tensor = self.last(torch.cat([hidden, fit], -1))[..., 0]
        return logits

    def fitting(self, vectors: Tensor, valid: Tensor, words: Tensor) -> Tensor:
        """[B, N] c_i: how well frames fit the gated words, standardised over those of a clip."""
        gates = self.gate(words).sigmoid() * (words != PADDING)[..., None]
        asked = (gates * self.word(words)).sum(1) / (gates.sum(1).clamp(min=1) * self.word.embedding_dim**0.5)
        fit = torch.einsum("bnd,bd->bn", self.fit(vectors), asked)
        count = valid.sum(1, keepdim=True)
        left = (fit - (fit * valid).sum(1, keepdim=True) / count) * valid
        spread = ((left**2).sum(1, keepdim=True) / count + FLAT**2).sqrt()
        return left / spread


class FrameScorer:
    """A trained network as the scorer that `mllm-select` takes: (frames, question) -> [N] in [0, 1].

    Args:
        network: trained.
        vocabulary: words of the table, from row 2 on.
        embedder: gives the frames' vectors; the one that the network was trained with.
        metadata: of the file.
    """

    def __init__(
        self,
        network: ScoreNetwork,
        vocabulary: Sequence[str],
        embedder: Embedder,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.network = network.eval()
        self.rows = {word: 2 + i for i, word in enumerate(vocabulary)}
        self.embedder = embedder
        self.metadata = dict(metadata or {})

    @classmethod
    def load(cls, path: str | os.PathLike[str], embedder: Embedder) -> FrameScorer:
        """A scorer from a file; read again only when it has changed.

        Raises:
            InvalidOptionError: there is no such file, it is damaged or none of a frame scorer, or it was trained with
                another embedder.
        """
        network, vocabulary, probed, metadata = _read(path)
        try:
            vectors = probe(embedder)
            same = vectors.shape == probed.shape and float((vectors * probed).sum(1).min()) >= SAME
        except InvalidOptionError:
            same = False
        if not same:
            raise InvalidOptionError(
                f"weights={os.fspath(path)!r} were trained with another embedder ({metadata['embedder']}) than this "
                f"{type(embedder).__name__}. Use that one, or train others: `{TRAIN}`."
            )
        return cls(network, vocabulary, embedder, metadata)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
        """Writes the file that :meth:`load` reads; `metadata` has to say what "embedder" and "data" are."""
        facts = {
            "format": FORMAT,
            "shape": json.dumps(self.network.shape),
            "vocabulary": json.dumps(list(self.rows)),
        }
        probed = torch.from_numpy(probe(self.embedder))
        weights.save(path, {**self.network.state_dict(), "probe": probed}, {**metadata, **facts})

    def __call__(self, frames: Array, question: str) -> Array:
        """[N] in [0, 1] for frames [N, h, w, 3] uint8 RGB."""
        return self.of(self.embedder.frames(frames), question)

    def of(self, vectors: Array, question: str) -> Array:
        """The same from the frames' vectors [N, D]."""
        given = torch.from_numpy(np.asarray(vectors, np.float32))[None]
        words = torch.tensor([read_words(question, self.rows)])
        with torch.inference_mode():
            logits = self.network(given, torch.ones(given.shape[:2], dtype=torch.bool), words)
        return checked(logits[0].sigmoid().numpy())


def read_words(question: str, rows: Mapping[str, int]) -> list[int]:
    """Rows of the word table for a question's first 32 words, lower case and without punctuation; at least one."""
    words = re.findall(r"\w+(?:['-]\w+)*", question.lower())[:MOST_WORDS]
    return [rows.get(word, UNKNOWN) for word in words] or [UNKNOWN]


def probe(embedder: Embedder) -> Array:
    """[2, D] float32 unit vectors of two fixed pictures, by which an embedder is known again.

    Raises:
        InvalidOptionError: the embedder gives another number of vectors.
    """
    y, x = np.indices((96, 96))
    pictures = [
        np.stack([2 * x, 2 * y, x + y], -1),
        np.stack([x // 8 % 2, y // 12 % 2, (x + y) // 16 % 2], -1) * 200,
    ]
    vectors = np.asarray(embedder.frames(np.stack(pictures).astype(np.uint8)), np.float32)
    if vectors.ndim != 2 or len(vectors) != 2:
        raise InvalidOptionError(f"{type(embedder).__name__} gave shape {vectors.shape} for 2 frames.")
    return vectors


def shipped(embedder: Embedder | None) -> Path | None:
    """The weights that come with the package, if the embedder is the reference CLIP that comes with it."""
    if not isinstance(embedder, CLIPEmbedder):
        return None
    from vtprune.eval.world import reference_dir

    folder = reference_dir("clip")
    return folder / weights.FOLDER / f"{NAME}{weights.SUFFIX}" if embedder.folder.samefile(folder) else None


def _read(path: str | os.PathLike[str]) -> tuple[ScoreNetwork, list[str], Array, Mapping[str, str]]:
    try:
        return _cached(os.fspath(path), os.stat(path).st_mtime_ns)
    except Exception as error:
        raise InvalidOptionError(
            f"weights={os.fspath(path)!r} cannot be read ({type(error).__name__}: {error}); give a file that "
            f"`{TRAIN}` wrote."
        ) from error


@lru_cache(maxsize=4)
def _cached(path: str, changed: int) -> tuple[ScoreNetwork, list[str], Array, Mapping[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: Mapping[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    probed = state.pop("probe").numpy()
    network, vocabulary = ScoreNetwork(**json.loads(metadata["shape"])), json.loads(metadata["vocabulary"])
    network.load_state_dict(state)
    if 2 + len(vocabulary) != network.shape["words"]:
        raise ValueError(f"it lists {len(vocabulary)} words for a table of {network.shape['words']} rows")
    for fact in ("embedder", "data"):
        if fact not in metadata:
            raise ValueError(f"its metadata do not say {fact!r}")
    return network, vocabulary, probed, metadata

"""Trains the frame scorer of `mllm-select` on the video world.

    python -m vtprune.eval.training.frame_scorer --output mllm-select.safetensors

Frames are encoded once by the shipped reference CLIP, which stays as it is; the network of `vtprune.video.scorer` is
trained on their vectors. A frame's label says whether it lies in the spans that hold the answer; questions without such
spans are left out. Clips are of the split `train`, and, against always seeing one scene per clip, rows of unrelated
pictures of the picture world's `train`. The checkpoint is chosen on clips of `val`, which the table is about as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vtprune.methods import weights
from vtprune.video.clip import Clip, FrameSelector, unit
from vtprune.video.correlation import kendall_tau
from vtprune.video.embedding import CLIPEmbedder, Embedder
from vtprune.video.relevance import FUNCTION_WORDS
from vtprune.video.scorer import PADDING, UNKNOWN, FrameScorer, ScoreNetwork, read_words
from vtprune.video.selection import MLLMSelect, create_selector

from ..prompts import EvaluationError
from ..results import versions
from ..world.questions import with_article
from ..world.scenes import atlas, make_scene, seed_range
from ..world.video import NEW_WORDS, VideoScene, clip
from ..world.video.batches import soften

SHARES = {"needle": 3, "moment": 2, "order": 1, "when": 1, "often": 1, "motion": 1, "still": 2, "exists": 1}
KINDS = tuple(SHARES)
SHORTEST, LONGEST = 24, 120  # candidates of a clip
TRAIN_FRAMES, VAL_CLIPS, PICTURES = 43_000, 30, 2_000
STEPS, BATCH, LEARNING_RATE, CHECKS = 1_200, 32, 2e-3, 5
ALIKE = 8  # batches whose rows are sorted by length, so that little is padded
BESIDE = ("uniform", "keyscore", "quota", "mllm-select")
GATE = 3.0  # before the sigmoid, of words that name something; of others the negative
OF_PICTURES, FORGOTTEN = 0.1, 0.03  # rows of unrelated pictures; words that are replaced by the unknown one

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Shot:
    """A clip to encode, of the video world.

    Attributes:
        split, index, kind, frames: as `vtprune.eval.world.video.clip` takes them.
        soft: whether its colour is stored at half the resolution, as in video files.
    """

    split: str
    index: int
    kind: str
    frames: int
    soft: bool


@dataclass(frozen=True)
class Lesson:
    """A clip as the scorer sees it, with a question.

    Attributes:
        kind: of the question.
        question: what is asked.
        vectors: [N, D] float16 unit vectors of the frames.
        labels: [N] bool, frames that hold the answer; at least one.
        spans: half-open spans of these frames.
        shot: the clip.
    """

    kind: str
    question: str
    vectors: Floats
    labels: NDArray[np.bool_]
    spans: tuple[tuple[int, int], ...]
    shot: Shot


@dataclass(frozen=True)
class Pictures:
    """Pictures of the picture world.

    Attributes:
        vectors: [P, D] float16 unit vectors.
        shows: [P, names of the atlas] bool, what each of them shows.
    """

    vectors: Floats
    shows: NDArray[np.bool_]


def plan(split: str, frames: int | None = None, clips: int | None = None) -> list[Shot]:
    """Clips of 24 to 120 frames (log-uniform), given one of the two: kinds by `SHARES` until there are so many frames,
    or so many clips of each kind."""
    rng = np.random.default_rng((0, len(split)))
    turns = [kind for kind, share in SHARES.items() for _ in range(share if clips is None else 1)]
    count = dict.fromkeys(KINDS, 0)
    shots: list[Shot] = []
    while len(shots) < clips * len(KINDS) if clips is not None else frames is not None and frames > 0:
        kind = turns[len(shots) % len(turns)]
        length = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1))))
        shots.append(Shot(split, count[kind], kind, length, bool(rng.random() < 0.5)))
        count[kind] += 1
        frames = None if frames is None else frames - length
    return shots


def drawn(shot: Shot) -> tuple[VideoScene, NDArray[np.uint8]]:
    """A clip and its frames [N, 96, 96, 3]."""
    scene = clip(shot.split, shot.index, shot.kind, shot.frames)
    frames = np.stack([scene.frame(i) for i in range(scene.length)])
    return scene, soften(frames) if shot.soft else frames


def encode(shots: Sequence[Shot], embedder: Embedder) -> Iterator[Floats]:
    """[N, D] float16 unit vectors of every clip's frames, one clip after another."""
    for shot in shots:
        yield embedder.frames(drawn(shot)[1]).astype(np.float16)


def encode_pictures(count: int, embedder: Embedder) -> Floats:
    """[count, D] float16 unit vectors of the first pictures of the picture world's `train`."""
    first, rows = seed_range("train").start, []
    for start in range(0, count, BATCH):
        images = [make_scene(first + i).pixels for i in range(start, min(start + BATCH, count))]
        rows.append(embedder.frames(np.stack(images)).astype(np.float16))
    return np.concatenate(rows)


def lessons(shots: Sequence[Shot], vectors: Sequence[Floats]) -> list[Lesson]:
    """Every question about every clip that some of its frames answer; the one it was made for comes first."""
    found = []
    for shot, seen in zip(shots, vectors, strict=True):
        for asked in clip(shot.split, shot.index, shot.kind, shot.frames).questions:
            if asked.spans and asked.needs_vision:
                labels = np.zeros(len(seen), bool)
                for start, stop in asked.spans:
                    labels[start:stop] = True
                found.append(Lesson(asked.kind, asked.text, seen, labels, asked.spans, shot))
    return found


def pictures(vectors: Floats) -> Pictures:
    """What the first pictures of the picture world's `train` show, beside their vectors."""
    first, names = seed_range("train").start, {name: i for i, name in enumerate(atlas().names)}
    shows = np.zeros((len(vectors), len(names)), bool)
    for i in range(len(vectors)):
        shows[i, [names[sticker.name] for sticker in make_scene(first + i).stickers]] = True
    return Pictures(vectors, shows)


def vocabulary(questions: Sequence[str]) -> list[str]:
    """Words of the scorer: those of the questions, of the video world, and of all things."""
    rows = dict.fromkeys(
        [*NEW_WORDS, *atlas().names, *atlas().groups, "is", "there", "see", "show", "shows", "which"]
    )
    for question in questions:
        for word in question.lower().replace("?", " ").split():
            rows[word] = None
    return sorted(rows)


class Lessons:
    """Endless batches: kinds equally often, windows of clips, rows of pictures.

    Args:
        known: of the clips.
        pool: of the pictures.
        rows: of the word table, by word.
        seed: of all that is drawn.
    """

    def __init__(self, known: Sequence[Lesson], pool: Pictures, rows: dict[str, int], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.by_kind = {kind: [lesson for lesson in known if lesson.kind == kind] for kind in KINDS}
        self.pool, self.rows = pool, rows
        self.waiting: list[list[tuple[Floats, NDArray[np.bool_], str]]] = []

    def one(self) -> tuple[Floats, NDArray[np.bool_], str]:
        """Vectors [N, D], labels [N] and question of one row."""
        rng = self.rng
        if rng.random() < OF_PICTURES:
            chosen = rng.permutation(len(self.pool.vectors))[: rng.integers(8, 65)]
            count = self.pool.shows[chosen].sum(0)
            names = np.flatnonzero((count > 0) & (count <= max(1, len(chosen) // 3)))
            name = int(names[rng.integers(len(names))])
            text = ("is there {}?", "does {} appear?")[rng.integers(2)]
            labels = self.pool.shows[chosen, name]
            return self.pool.vectors[chosen], labels, text.format(with_article(atlas().names[name]))
        kinds = [kind for kind, mine in self.by_kind.items() if mine]
        mine = self.by_kind[kinds[rng.integers(len(kinds))]]
        lesson = mine[rng.integers(len(mine))]
        vectors, labels = lesson.vectors, lesson.labels
        if rng.random() < 0.5:  # a window that still holds something
            n = len(labels)
            length = int(rng.integers(max(8, n // 3), n + 1))
            start = int(rng.integers(n - length + 1))
            if labels[start : start + length].any():
                vectors, labels = vectors[start : start + length], labels[start : start + length]
        return vectors, labels, lesson.question

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors [B, N, D], valid [B, N], words [B, L] and labels [B, N] (float, 0 in padding)."""
        if not self.waiting:
            rows = sorted((self.one() for _ in range(ALIKE * size)), key=lambda row: len(row[1]))
            order = self.rng.permutation(ALIKE)
            self.waiting = [rows[i * size : (i + 1) * size] for i in order]
        found = self.waiting.pop()
        n = max(len(labels) for _, labels, _ in found)
        asked = [read_words(question, self.rows) for _, _, question in found]
        words = torch.full((size, max(map(len, asked))), PADDING)
        vectors = torch.zeros(size, n, found[0][0].shape[1])
        valid, labels = torch.zeros(size, n, dtype=torch.bool), torch.zeros(size, n)
        for i, (seen, inside, _) in enumerate(found):
            vectors[i, : len(seen)] = torch.from_numpy(seen.astype(np.float32))
            valid[i, : len(seen)] = True
            labels[i, : len(seen)] = torch.from_numpy(inside.astype(np.float32))
            words[i, : len(asked[i])] = torch.tensor(asked[i])
        unread = torch.from_numpy(self.rng.random(words.shape) < FORGOTTEN) & (words != PADDING)
        return vectors, valid, words.masked_fill(unread, UNKNOWN), labels


def loss_of(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of every frame (mean over a clip), and of the distribution over a clip's frames against the even
    one over those with the label, which ranks them; the mean over clips of their sum."""
    each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * valid
    frame = each.sum(1) / valid.sum(1)
    share = logits.masked_fill(~valid, -1e9).log_softmax(1)
    ranked = -(share * labels).sum(1) / labels.sum(1)
    return (frame + ranked).mean()


def start(network: ScoreNetwork, rows: dict[str, int], embedder: Embedder) -> None:
    """Lets a network whose width is the vectors' begin at the cosine of frames with the words that name something."""
    size = network.shape["size"]
    if size != network.shape["width"]:
        return
    with torch.no_grad():
        network.word.weight[2:] = torch.from_numpy(embedder.text(list(rows))) * size**0.5
        network.frame.weight[:, size : 2 * size] = torch.eye(size)
        network.fit.weight.copy_(torch.eye(size))
        network.gate.weight.fill_(-GATE)
        for word, row in rows.items():
            if word not in FUNCTION_WORDS and word not in NEW_WORDS:
                network.gate.weight[row] = GATE
        network.last.weight[0, -1] = 1.0


def train(
    known: Sequence[Lesson],
    pool: Pictures,
    embedder: Embedder,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    check: Callable[[FrameScorer, int, float], float] | None = None,
) -> FrameScorer:
    """Trains a fresh network.

    Args:
        known: questions about clips.
        pool: unrelated pictures.
        embedder: that made the vectors.
        steps: of AdamW, the rate rising for a twentieth of them and falling to 0 along a cosine.
        batch: rows of a step.
        seed: of parameters and rows.
        check: is given a scorer, the step and the mean loss since the last call, five times; the network for which it
            returns the most is kept. Without it, the last one.
    """
    torch.manual_seed(seed)
    words = vocabulary([lesson.question for lesson in known])
    network = ScoreNetwork(known[0].vectors.shape[1], 2 + len(words))
    scorer = FrameScorer(network, words, embedder)
    start(network, scorer.rows, embedder)
    rows = Lessons(known, pool, scorer.rows, seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, 0.5 + 0.5 * float(np.cos(np.pi * n / steps)))
    )
    best: tuple[float, dict[str, Tensor]] | None = None
    losses: list[float] = []
    for step in range(1, steps + 1):
        network.train()
        vectors, valid, asked, labels = rows.batch(batch)
        loss = loss_of(network(vectors, valid, asked), labels, valid)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if check is not None and step * CHECKS // steps > (step - 1) * CHECKS // steps:
            network.eval()
            value = check(scorer, step, float(np.mean(losses)))
            losses.clear()
            if best is None or value >= best[0]:
                best = value, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if best is not None:
        network.load_state_dict(best[1])
    network.eval()
    return scorer


def asked_once(found: Sequence[Lesson], most: int = VAL_CLIPS) -> list[Lesson]:
    """Of every kind so many questions, each about another clip."""
    chosen: dict[tuple[str, Shot], Lesson] = {}
    for lesson in found:
        if sum(kind == lesson.kind for kind, _ in chosen) < most:
            chosen.setdefault((lesson.kind, lesson.shot), lesson)
    return sorted(chosen.values(), key=lambda lesson: KINDS.index(lesson.kind))


class Kept(Embedder):
    """Vectors that are known already, and an embedder for texts.

    Args:
        vectors: [N, D] of the frames.
        texts: the embedder.
    """

    def __init__(self, vectors: Floats, texts: Embedder) -> None:
        self.vectors, self.texts = vectors, texts

    def frames(self, frames: NDArray[np.uint8]) -> Floats:
        """[N, D], whatever the frames."""
        return unit(self.vectors.astype(np.float64))

    def text(self, texts: Sequence[str]) -> Floats:
        """[T, D] of the embedder."""
        return self.texts.text(texts)


def measured(
    make: Callable[[Embedder], FrameSelector], found: Sequence[Lesson], texts: Embedder, pixels: bool = True
) -> dict[str, tuple[float, ...]]:
    """What a selector finds with a tenth of the frames, by kind of question.

    Args:
        make: gives the selector for the embedder of a clip.
        found: questions.
        texts: embedder of texts.
        pixels: whether it sees the frames or, faster, only their vectors.

    Returns:
        Percent of the spans of a question of which at least one frame is kept; of the scores (NaN without) Kendall's
        tau-b with the labels, and the share of pairs of a relevant and another frame that they put in the right order,
        equal scores counting half: means over the questions.
    """
    rows: dict[str, list[tuple[float, ...]]] = {}
    for lesson in found:
        n = len(lesson.labels)
        frames = drawn(lesson.shot)[1] if pixels else np.zeros((n, 1, 1, 3), np.uint8)
        embedder = Kept(lesson.vectors, texts)
        seen = Clip(np.arange(n), frames, n, question=lesson.question, embedder=embedder)
        chosen = make(embedder).select(seen, max(1, n // 10))
        hit = [any(start <= i < stop for i in chosen.indices.tolist()) for start, stop in lesson.spans]
        recall = 100 * float(np.mean(hit))
        if chosen.scores is None:
            rows.setdefault(lesson.kind, []).append((recall, np.nan, np.nan))
            continue
        above = np.sign(chosen.scores[lesson.labels][:, None] - chosen.scores[~lesson.labels])
        ordered = float((above + 1).mean() / 2) if above.size else np.nan
        rows.setdefault(lesson.kind, []).append((recall, kendall_tau(chosen.scores, lesson.labels), ordered))
    return {kind: tuple(map(mean, zip(*row, strict=True))) for kind, row in rows.items()}


def mean(values: Sequence[float]) -> float:
    """Of those that are not NaN; NaN if there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument(
        "--cache", type=Path, help="npz file of the frames' vectors: read, or written if missing"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and rows (default 0)")
    parser.add_argument("--measure", action="store_true", help="no training: the table of --output as it is")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seed < 0:
        parser.error("--steps has to be 1 or more, --seed 0 or more")
    if arguments.output.suffix != weights.SUFFIX:
        parser.error(f"--output {arguments.output} must end in {weights.SUFFIX}")
    if arguments.cache is not None and arguments.cache.suffix != ".npz":
        parser.error(f"--cache {arguments.cache} must end in .npz")
    embedder = CLIPEmbedder()
    try:
        known, val, pool = material(embedder, arguments.cache)
    except EvaluationError as error:
        parser.error(str(error))
    checked = asked_once(val)
    start = time.monotonic()

    def selected(scorer: FrameScorer) -> dict[str, tuple[float, ...]]:
        def make(own: Embedder) -> FrameSelector:
            return MLLMSelect(scorer=FrameScorer(scorer.network, list(scorer.rows), own))

        return measured(make, checked, embedder, pixels=False)

    def check(scorer: FrameScorer, step: int, loss: float) -> float:
        recall, tau, ordered = np.mean(list(selected(scorer).values()), 0)
        minutes = (time.monotonic() - start) / 60
        figures = f"recall {recall:.1f}, tau {tau:.3f}, ordered {ordered:.3f}"
        print(f"step {step}: loss {loss:.3f}, {figures}, {minutes:.1f} min", flush=True)
        return float(recall)

    if arguments.measure:
        scorer = FrameScorer.load(arguments.output, embedder)
    else:
        scorer = train(known, pool, embedder, arguments.steps, seed=arguments.seed, check=check)
        words = ["python", "-m", "vtprune.eval.training.frame_scorer", "--output", arguments.output.name]
        words += ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
        mine = selected(scorer)
        scorer.save(
            arguments.output,
            {
                "method": MLLMSelect.key,
                "embedder": "the reference CLIP that comes with vtprune",
                "data": f"the video world, split train, {len({lesson.shot for lesson in known})} clips",
                "seed": str(arguments.seed),
                "steps": str(arguments.steps),
                "validation": json.dumps(
                    {kind: [round(v, 3) for v in values] for kind, values in mine.items()}
                ),
                "versions": json.dumps(versions()),
                "command": shlex.join(words),
            },
        )
    table = {}
    for name in BESIDE:

        def make(_: Embedder, name: str = name) -> FrameSelector:
            return create_selector(
                name
            )  # whose embedder is not the reference CLIP, so mllm-select has no weights

        title = f"{name}, untrained" if name == MLLMSelect.key else name
        table[title] = measured(make, checked, embedder, pixels=name == "keyscore")
    table[MLLMSelect.key] = selected(scorer)
    print("| selector |", " | ".join(KINDS), "|\n|---|" + "---|" * len(KINDS))
    for name, row in table.items():
        cells = ("{:.0f} / {:.2f} / {:.2f}".format(*row[kind]).replace("nan", "-") for kind in KINDS)
        print(f"| `{name}` |", " | ".join(cells), "|")


def material(embedder: Embedder, cache: Path | None) -> tuple[list[Lesson], list[Lesson], Pictures]:
    """Questions for training and for validation, and the pictures.

    Raises:
        EvaluationError: the cache is of other clips.
    """
    shots = {"train": plan("train", frames=TRAIN_FRAMES), "val": plan("val", clips=VAL_CLIPS)}
    wanted = json.dumps([shots["train"][-1].__dict__, shots["val"][-1].__dict__, PICTURES])
    if cache is not None and cache.is_file():
        with np.load(cache) as file:
            kept = {name: file[name] for name in file.files}
        if str(kept.get("plan")) != wanted:
            raise EvaluationError(
                f"{cache} holds the vectors of other clips; give another --cache, or remove it."
            )
    else:
        kept = {name: np.concatenate(list(encode(mine, embedder))) for name, mine in shots.items()}
        kept["pictures"] = encode_pictures(PICTURES, embedder)
        if cache is not None:
            np.savez(cache, plan=np.array(wanted), **kept)
    found = {}
    for name, mine in shots.items():
        ends = np.cumsum([shot.frames for shot in mine])[:-1]
        found[name] = lessons(mine, np.split(kept[name], ends))
    return found["train"], found["val"], pictures(kept["pictures"])


if __name__ == "__main__":
    main()

"""The trained scorer of mllm-select: its network against loops, its files, its training, and the shipped weights."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vtprune.errors import InvalidOptionError
from vtprune.eval.training import frame_scorer
from vtprune.eval.training.frame_scorer import Lesson, Lessons, Pictures, Shot, loss_of, plan
from vtprune.eval.world import reference_dir
from vtprune.eval.world.scenes import atlas
from vtprune.eval.world.video import clip as world_clip
from vtprune.video.relevance import SUBSTITUTE
from vtprune.video.scorer import PADDING, UNKNOWN, FrameScorer, ScoreNetwork, read_words, shipped
from vtprune.video.selection import Clip, CLIPEmbedder, Embedder, create_selector

SIZE = 6
WORDS = ("does", "the", "dog", "appear")
SHIPPED = reference_dir("clip") / "vtprune" / "mllm-select.safetensors"


class Colours(Embedder):
    """Frames by a fixed linear map of their mean colours, texts by their letters."""

    def __init__(self, seed: int = 0, size: int = SIZE) -> None:
        self.map = np.random.default_rng(seed).normal(size=(4, size))

    def frames(self, frames: np.ndarray) -> np.ndarray:
        colours = frames.mean((1, 2)) / 255 - 0.5
        return unit(np.column_stack([colours, np.full(len(frames), 0.1)]) @ self.map)

    def text(self, texts: Sequence[str]) -> np.ndarray:
        rows = [np.random.default_rng(list(t.encode())).normal(size=self.map.shape[1]) for t in texts]
        return unit(np.stack(rows)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def network(seed: int = 0, size: int = SIZE, words: int = 2 + len(WORDS)) -> ScoreNetwork:
    """A network none of whose parameters is 0 or 1."""
    torch.manual_seed(seed)
    made = ScoreNetwork(size, words, width=8, layers=2, heads=2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def given_frames(seed: int, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def scorer(seed: int = 0) -> FrameScorer:
    return FrameScorer(network(seed), WORDS, Colours())


# The network ---------------------------------------------------------------------------------------------------


def literal(made: ScoreNetwork, vectors: np.ndarray, words: list[int]) -> list[float]:
    """The formulas of the docstring, number by number."""
    p = {name: tensor.double().numpy() for name, tensor in made.state_dict().items()}
    n, size = vectors.shape
    width, heads = 8, 2

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p[name + ".weight"] + p[name + ".bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return p[name + ".weight"] @ x + p.get(name + ".bias", 0.0)

    def gelu(x: np.ndarray) -> np.ndarray:
        return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])

    gates = [1 / (1 + math.exp(-p["gate.weight"][w, 0])) for w in words]
    z = sum(g * p["word.weight"][w] for g, w in zip(gates, words, strict=True))
    z = z / (math.sqrt(width) * max(1.0, sum(gates)))
    fit = np.array([float(linear(e, "fit") @ z) for e in vectors])
    fit = (fit - fit.mean()) / math.sqrt(fit.var() + 0.02**2)
    x = []
    for i in range(n):
        around = np.concatenate([vectors[max(i - 1, 0)], vectors[i], vectors[min(i + 1, n - 1)]])
        t = (i + 0.5) / n
        waves = [math.sin(2**f * math.pi * t) for f in range(4)] + [
            math.cos(2**f * math.pi * t) for f in range(4)
        ]
        x.append(
            linear(around * math.sqrt(size), "frame")
            + linear(np.array(waves), "time")
            + p["fits.weight"][:, 0] * fit[i]
        )
    x += [p["word.weight"][w] + p["place.weight"][j] for j, w in enumerate(words)]
    x.append(p["query"])
    for layer in range(2):
        name = f"blocks.{layer}."
        qkv = [linear(norm(token, name + "before_mixing"), name + "qkv") for token in x]
        new = []
        for a, token in enumerate(x):
            mixed = []
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                logits = []
                for b in range(len(x)):
                    logit = qkv[a][:width][part] @ qkv[b][width : 2 * width][part] / math.sqrt(width / heads)
                    if a < n and b < n:
                        logit += p["near"][h, max(-16, min(16, b - a)) + 16]
                    logits.append(logit)
                share = np.exp(np.array(logits) - max(logits))
                share /= share.sum()
                mixed.append(sum(s * qkv[b][2 * width :][part] for b, s in enumerate(share)))
            token = token + linear(np.concatenate(mixed), name + "out")
            inner = gelu(linear(norm(token, name + "before_mlp"), name + "mlp.0"))
            new.append(token + linear(inner, name + "mlp.2"))
        x = new
    query = linear(norm(x[-1], "norm"), "of_query")
    hidden = [gelu(linear(norm(x[i], "norm"), "of_frame") + query) for i in range(n)]
    return [float(linear(np.append(h, c), "last")[0]) for h, c in zip(hidden, fit, strict=True)]


@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 40), words=st.lists(st.integers(1, 5), min_size=1, max_size=7), seed=st.integers(0, 99)
)
def test_the_network_is_its_definition(n: int, words: list[int], seed: int) -> None:
    made, vectors = network(seed), given_frames(seed, 1, n, SIZE)
    with torch.inference_mode():
        found = made(vectors, torch.ones(1, n, dtype=torch.bool), torch.tensor([words]))[0]
    assert np.allclose(found.numpy(), literal(made, vectors[0].double().numpy(), words), atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    more=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_rows_of_any_length_are_scored_as_alone(lengths: list[int], more: int, seed: int) -> None:
    made, rng = network(seed), np.random.default_rng(seed)
    n, longest = max(lengths) + more, 6
    vectors = given_frames(seed, len(lengths), n, SIZE)  # padding is no zeros here, and must not matter
    valid = torch.arange(n) < torch.tensor(lengths)[:, None]
    words = torch.full((len(lengths), longest), PADDING)
    for row, asked in enumerate(rng.integers(1, longest + 1, len(lengths))):
        words[row, :asked] = torch.from_numpy(rng.integers(1, 6, asked))
    with torch.inference_mode():
        together = made(vectors, valid, words)
        for i, length in enumerate(lengths):
            asked = words[i][words[i] != PADDING][None]
            alone = made(vectors[i : i + 1, :length], valid[i : i + 1, :length], asked)
            assert torch.allclose(together[i, :length], alone[0], atol=1e-4)


def test_questions_and_places_matter() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    judge = scorer()
    scores = judge(frames, "does the dog appear?")
    assert scores.shape == (9,)
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert np.array_equal(scores, judge.of(Colours().frames(frames), "Does the DOG appear ?"))
    assert not np.allclose(scores, judge(frames, "does the cat appear?"), atol=1e-4)
    assert not np.allclose(scores, judge(frames[::-1], "does the dog appear?")[::-1], atol=1e-4)
    assert np.array_equal(scores, pickle.loads(pickle.dumps(judge))(frames, "does the dog appear?"))


def test_words_are_read_and_unknown_ones_handled() -> None:
    rows = {"dog": 2, "the": 3, "t-shirt": 4}
    assert read_words("The dog, the CAT & the t-shirt?", rows) == [3, 2, 3, UNKNOWN, 3, 4]
    assert read_words("?!", rows) == [UNKNOWN]
    assert read_words("dog " * 100, rows) == [2] * 32
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    assert np.isfinite(scorer()(frames, "où est-ce " * 50)).all()


# Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "scorer.safetensors"
    scorer().save(file, {"embedder": "colours", "data": "nothing"})
    return file


def test_a_file_gives_the_same_scores(path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype(np.uint8)
    loaded = FrameScorer.load(path, Colours())
    assert np.array_equal(loaded(frames, "the dog?"), scorer()(frames, "the dog?"))
    assert loaded.metadata["data"] == "nothing"
    clip = Clip(np.arange(9), frames, 9, question="the dog?", embedder=Colours())
    selector = create_selector("mllm-select", weights=path)
    json.dumps(dataclasses.asdict(selector))
    chosen = selector.select(clip, 2)
    assert chosen.scores is not None
    assert np.allclose(chosen.scores, loaded(frames, "the dog?"), atol=1e-6)
    assert (
        chosen.indices.tolist()
        == create_selector("mllm-select", scorer=loaded).select(clip, 2).indices.tolist()
    )
    assert "nothing" in chosen.notes[0]


def test_files_of_another_embedder_are_refused(path: Path) -> None:
    for other in (Colours(seed=1), Colours(size=SIZE + 1)):
        with pytest.raises(InvalidOptionError, match=r"another embedder \(colours\).*frame_scorer"):
            FrameScorer.load(path, other)

    class Fixed(Colours):
        def frames(self, frames: np.ndarray) -> np.ndarray:
            return np.ones((7, SIZE)) / math.sqrt(SIZE)

    with pytest.raises(InvalidOptionError, match="another embedder"):
        FrameScorer.load(path, Fixed())
    clip = Clip([0], np.zeros((1, 4, 4, 3), np.uint8), 1, question="a dog?", embedder=Colours(seed=1))
    with pytest.raises(InvalidOptionError, match="another embedder"):
        create_selector("mllm-select", weights=path).select(clip, 1)


def rewritten(path: Path, change: Any, facts: dict[str, str] | None = None) -> Path:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    target = path.with_name("changed.safetensors")
    save_file(tensors, target, {**metadata, **(facts or {})})
    return target


@pytest.mark.parametrize(
    ("change", "facts", "says"),
    [
        (lambda t: t.pop("query"), {}, "query"),
        (lambda t: t.pop("probe"), {}, "probe"),
        (lambda t: t.update(more=torch.zeros(1)), {}, "more"),
        (lambda t: t.update(query=torch.zeros(3)), {}, "query"),
        (lambda t: None, {"format": "other"}, "'other'"),
        (lambda t: None, {"vocabulary": '["dog"]'}, "words"),
        (lambda t: None, {"shape": "{"}, "JSON"),
    ],
)
def test_other_files_are_refused(path: Path, change: Any, facts: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"(?s)cannot be read.*{says}.*frame_scorer"):
        FrameScorer.load(rewritten(path, change, facts), Colours())


def test_missing_and_broken_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="cannot be read"):
        FrameScorer.load(tmp_path / "none.safetensors", Colours())
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidOptionError, match="cannot be read"):
        FrameScorer.load(broken, Colours())
    with pytest.raises(InvalidOptionError, match="one of them"):
        create_selector("mllm-select", weights=path, scorer=scorer())


# Training ------------------------------------------------------------------------------------------------------


def test_loss_is_its_definition() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.3, 2.0, 9.0]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    total = 0.0
    for row, n in ((0, 3), (1, 2)):
        s, y = logits[row, :n].tolist(), labels[row, :n].tolist()
        each = [math.log(1 + math.exp(-v if wanted else v)) for v, wanted in zip(s, y, strict=True)]
        whole = math.log(sum(map(math.exp, s)))
        ranked = [whole - v for v, wanted in zip(s, y, strict=True) if wanted]
        total += sum(each) / n + sum(ranked) / len(ranked)
    assert float(loss_of(logits, labels, valid)) == pytest.approx(total / 2, abs=1e-5)


def taught(seed: int = 0, rows: int = 30) -> tuple[list[Lesson], Pictures]:
    """Clips whose relevant frames are those with the vector of the name that the question has."""
    rng, table = (
        np.random.default_rng(seed),
        Colours().map[:3] / np.linalg.norm(Colours().map[:3], axis=1)[:, None],
    )
    names = atlas().names[:3]
    found = []
    for number in range(rows):
        shows = rng.integers(0, 3, 20)
        name = int(shows[rng.integers(20)])
        shot = Shot("train", number, "when", 20, False)
        text = f"when does the {names[name]} appear?"
        found.append(Lesson("when", text, table[shows].astype(np.float16), shows == name, ((0, 1),), shot))
    shows = np.zeros((60, len(atlas().names)), bool)
    shows[np.arange(60), np.arange(60) % 3] = True
    return found, Pictures(table[np.arange(60) % 3].astype(np.float16), shows)


def test_one_step_lowers_the_loss() -> None:
    known, pool = taught()
    made = network(words=2 + 60)
    words = {word: 2 + i for i, word in enumerate(frame_scorer.vocabulary([x.question for x in known])[:60])}
    vectors, valid, asked, labels = Lessons(known, pool, words, 0).batch(16)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.01)
    loss = loss_of(made(vectors, valid, asked), labels, valid)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    optimiser.step()
    with torch.inference_mode():
        assert float(loss_of(made(vectors, valid, asked), labels, valid)) < loss.item()


def test_training_learns_and_keeps_the_best(tmp_path: Path) -> None:
    known, pool = taught()
    seen: list[tuple[int, float]] = []

    def check(judge: FrameScorer, step: int, loss: float) -> float:
        seen.append((step, loss))
        kept.append({name: tensor.clone() for name, tensor in judge.network.state_dict().items()})
        return -abs(step - 24)

    kept: list[dict[str, torch.Tensor]] = []
    judge = frame_scorer.train(known, pool, Colours(), steps=40, batch=16, check=check)
    assert [step for step, _ in seen] == [8, 16, 24, 32, 40]
    assert seen[-1][1] < seen[0][1]
    assert all(torch.equal(tensor, kept[2][name]) for name, tensor in judge.network.state_dict().items())
    again = frame_scorer.train(known, pool, Colours(), steps=40, batch=16, check=lambda *_: 0.0)
    assert all(torch.equal(tensor, kept[-1][name]) for name, tensor in again.network.state_dict().items())


def test_rows_keep_frames_and_labels_together() -> None:
    known, pool = taught()
    rows = {name: 2 + i for i, name in enumerate(atlas().names[:3])}
    found = {tuple(np.round(v, 2)): i for i, v in enumerate(pool.vectors[:3].astype(np.float32))}
    lengths, drawn = set(), Lessons(known, pool, rows, 0)
    for _ in range(12):
        vectors, valid, words, labels = drawn.batch(20)
        for row in range(20):
            n = int(valid[row].sum())
            lengths.add(n)
            assert valid[row, :n].all()
            assert not labels[row, n:].any()
            assert labels[row].any()
            names = [int(w) - 2 for w in words[row] if int(w) >= 2]
            if names:  # else the name was one of the forgotten words
                shown = [found[tuple(np.round(v, 2))] for v in vectors[row, :n].numpy()]
                assert labels[row, :n].tolist() == [float(s == names[0]) for s in shown]
    assert len(lengths) > 3


def test_lessons_are_the_worlds_ground_truth() -> None:
    train, val = plan("train", frames=600), plan("val", clips=1)
    assert {shot.split for shot in train} == {"train"}
    assert sorted(shot.kind for shot in val) == sorted(frame_scorer.KINDS)
    assert all(24 <= shot.frames <= 120 for shot in train + val)
    assert train == plan("train", frames=900)[: len(train)]
    found = frame_scorer.lessons(val, [np.zeros((shot.frames, 2), np.float16) for shot in val])
    assert {lesson.kind for lesson in found} == set(frame_scorer.KINDS)
    for lesson in found:
        scene = world_clip(lesson.shot.split, lesson.shot.index, lesson.shot.kind, lesson.shot.frames)
        asked = next(q for q in scene.questions if q.text == lesson.question)
        inside = [any(start <= i < stop for start, stop in asked.spans) for i in range(scene.length)]
        assert lesson.labels.tolist() == inside
        assert any(inside)


def test_the_command_trains_measures_and_keeps_the_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("LONGEST", 24), ("TRAIN_FRAMES", 96), ("VAL_CLIPS", 1), ("PICTURES", 70)):
        monkeypatch.setattr(frame_scorer, name, value)
    output, cache = tmp_path / "mine.safetensors", tmp_path / "vectors.npz"
    options = ["--output", str(output), "--cache", str(cache)]
    frame_scorer.main([*options, "--steps", "5"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed if line.startswith("step")] == [
        f"step {i}" for i in range(1, 6)
    ]
    monkeypatch.setattr(frame_scorer, "encode", None)
    frame_scorer.main([*options, "--measure"])
    table = capsys.readouterr().out.splitlines()
    assert table == printed[5:]
    assert len(table) == 2 + len(frame_scorer.BESIDE) + 1
    metadata = FrameScorer.load(output, CLIPEmbedder()).metadata
    assert metadata["command"].endswith("--output mine.safetensors --steps 5 --seed 0")
    assert set(json.loads(metadata["validation"])) == set(frame_scorer.KINDS)
    monkeypatch.setattr(frame_scorer, "PICTURES", 60)
    for wrong, says in (
        ([*options], "other clips"),
        (["--output", str(tmp_path / "x.bin")], "must end in .safetensors"),
        (["--output", str(output), "--cache", "x"], "must end in .npz"),
        ([*options, "--steps", "0"], "--steps"),
    ):
        with pytest.raises(SystemExit):
            frame_scorer.main(wrong)
        assert says in capsys.readouterr().err


# The shipped weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged() -> list[tuple[Lesson, np.ndarray]]:
    """Scores of the shipped weights for clips of the val split that the training never saw."""
    clip_embedder = CLIPEmbedder()
    shots = [Shot("val", 5000 + i, kind, 30, False) for kind in frame_scorer.KINDS for i in range(2)]
    found = frame_scorer.lessons(shots, list(frame_scorer.encode(shots, clip_embedder)))
    judge = FrameScorer.load(SHIPPED, clip_embedder)
    return [(lesson, judge.of(lesson.vectors, lesson.question)) for lesson in found]


def test_shipped_weights_beat_chance(judged: list[tuple[Lesson, np.ndarray]]) -> None:
    for kind in frame_scorer.KINDS:
        hits, chance = [], []
        for lesson, scores in judged:
            if lesson.kind == kind:
                hits.append(lesson.labels[np.argsort(-scores)[:3]].mean())
                chance.append(lesson.labels.mean())
        assert np.mean(hits) > np.mean(chance) + 0.1, kind


def test_the_reference_clip_has_its_weights_by_name(tmp_path: Path) -> None:
    assert SHIPPED.stat().st_size < 1 << 20
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 96, 96, 3)).astype(np.uint8)
    clip = Clip(np.arange(6), frames, 6, question="when does the dog appear?", embedder=CLIPEmbedder())
    chosen = create_selector("mllm-select").select(clip, 2)
    assert chosen.notes != (SUBSTITUTE,)
    assert "video world, split train" in chosen.notes[0]
    assert np.allclose(
        chosen.scores, FrameScorer.load(SHIPPED, CLIPEmbedder())(frames, str(clip.question)), atol=1e-5
    )
    copy = tmp_path / "clip"
    shutil.copytree(reference_dir("clip"), copy, ignore=shutil.ignore_patterns("vtprune"))
    assert shipped(CLIPEmbedder(copy)) is None
    other = dataclasses.replace(clip, embedder=CLIPEmbedder(copy))
    assert create_selector("mllm-select").select(other, 2).notes == (SUBSTITUTE,)
    assert create_selector("mllm-select", weights=SHIPPED).select(other, 2).notes == chosen.notes
    assert shipped(None) is shipped(Colours()) is None

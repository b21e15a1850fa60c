"""`vtprune eval --suite video`: positions of chosen frames, the choice, the answers, and every column of the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="clips are written by PyAV (pip install vtprune[video])")
pytest.importorskip("torchvision", reason="Qwen2-VL's video processor needs it (pip install vtprune[video])")

from vtprune.errors import InvalidOptionError, UnknownMethodError, UnsupportedModelError, VTPruneError
from vtprune.eval.cli import main
from vtprune.eval.prompts import load_model
from vtprune.eval.video import answers, command, suite
from vtprune.eval.video.answers import Asker
from vtprune.eval.video.relevance import named_things
from vtprune.eval.video.results import read_line
from vtprune.eval.video.settings import NO_VIDEO, Selection, VideoSetting, parse_selection, plan
from vtprune.eval.video.tables import markdown, read_rows
from vtprune.eval.video.tower import frames_remembered
from vtprune.eval.world import video
from vtprune.method import resolve_keep
from vtprune.video.clip import Clip
from vtprune.video.correlation import kendall_tau, spearman_rho
from vtprune.video.embedding import Array, Embedder
from vtprune.video.positions import frame_positions
from vtprune.video.selection import create_selector

CANDIDATES = 24
TOKENS = 16
NEW_TOKENS = 2


class Colours(Embedder):
    """Mean colours in the place of a trained model."""

    def frames(self, frames: Array) -> Array:
        x = frames.reshape(len(frames), -1, 3).mean(1)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def text(self, texts: Any) -> Array:
        x = np.array([[len(text), text.count("a") + 1, text.count("e") + 1] for text in texts], dtype=float)
        return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "NEW_TOKENS", NEW_TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the video reference model's shape with random weights."""
    from transformers import Qwen2VLForConditionalGeneration

    from vtprune.eval.world.video import model

    path = tmp_path_factory.mktemp("qwen2-vl")
    torch.manual_seed(0)
    model.save(Qwen2VLForConditionalGeneration(model.config()), path)
    return path


@pytest.fixture(scope="module")
def asker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Asker:
    model, processor = load_model(str(folder), "cpu", "auto")
    return Asker(model, processor, CANDIDATES, 4, tmp_path_factory.mktemp("clips"), Colours())


@pytest.fixture(scope="module")
def questions() -> list[video.VideoExample]:
    return video.examples("val", 4, ("needle", "moment", "exists", "known"), seed=3, frames=CANDIDATES)


PLACES = [[1, 4, 5, 20], [0, 23]]


def prompt(asker: Asker) -> dict[str, torch.Tensor]:
    frames = [np.full((len(one), 96, 96, 3), 40 * i, np.uint8) for i, one in enumerate(PLACES)]
    return asker.prompter.inputs(frames, PLACES, ["what appears for a moment?", "how often?"], CANDIDATES)


def test_positions_are_those_of_the_rule(asker: Asker) -> None:
    inputs = prompt(asker)
    assert inputs["attention_mask"].min() == 0  # the rows are of different lengths
    for row, places in enumerate(PLACES):
        expected = []
        seen = 0
        for token in inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist():
            if token == asker.prompter.model.config.video_token_id:
                if seen == 0:
                    start = expected[-1][0] + 1
                place, within = divmod(seen, TOKENS)
                expected.append([start + places[place], start + within // 4, start + within % 4])
                seen += 1
            elif 0 < seen == len(places) * TOKENS:
                expected.append([start + CANDIDATES] * 3)
                seen += 1
            else:
                expected.append([expected[-1][0] + 1] * 3 if expected else [0] * 3)
        found = inputs["position_ids"][:, row, inputs["attention_mask"][row].bool()]
        assert found.T.tolist() == expected


def test_chosen_frames_are_to_the_model_what_pruned_tokens_are(asker: Asker) -> None:
    """Judge: the dense model in whose attention the tokens of the other frames are hidden."""
    model = asker.prompter.model
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
    chosen = [1, 2, 5]
    small = asker.prompter.inputs([frames[chosen]], [chosen], ["how often?"], 6)
    whole = asker.prompter.inputs([frames], [list(range(6))], ["how often?"], 6)
    video_token = model.config.video_token_id
    place = (whole["input_ids"][0] == video_token).cumsum(0) - 1
    hidden = (whole["input_ids"][0] == video_token) & ~torch.isin(place // TOKENS, torch.tensor(chosen))
    length = whole["input_ids"].shape[1]
    sees = torch.tril(torch.ones(length, length, dtype=torch.bool)) & ~hidden[None]
    sees |= torch.eye(length, dtype=torch.bool)
    whole.pop("attention_mask")
    with torch.no_grad():
        a = model(**small).logits[0]
        b = model(**whole, attention_mask=torch.where(sees, 0.0, -torch.inf)[None, None]).logits[0]
    torch.testing.assert_close(a, b[~hidden], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "places",
    [[[1, 4, 5, 20]], [[1, 4, 5], [0, 23]], [[1, 5, 4, 20], [0, 23]], [[1, 4, 5, 20], [0, 24]]],
)
def test_places_that_do_not_fit_are_refused(asker: Asker, places: list[list[int]]) -> None:
    inputs = prompt(asker)
    with pytest.raises(InvalidOptionError, match="places"):
        frame_positions(asker.prompter.model, inputs, places, CANDIDATES)


def test_models_without_mrope_are_refused() -> None:
    from transformers import LlavaConfig

    class Other(torch.nn.Module):
        config = LlavaConfig()

    with pytest.raises(UnsupportedModelError, match="'llava'"):
        frame_positions(Other(), {}, [], 4)


def test_every_frame_is_encoded_once(asker: Asker) -> None:
    tower = asker.prompter.model.model.visual
    pixels = torch.randn(5 * 64, 432)
    calls: list[int] = []
    stock = type(tower).forward

    def counted(self: Any, hidden_states: Any, grid_thw: Any, **kwargs: Any) -> Any:
        calls.append(len(hidden_states) // 64)
        return stock(self, hidden_states, grid_thw=grid_thw, **kwargs)

    with torch.no_grad():
        expected = tower(pixels, grid_thw=torch.tensor([[5, 8, 8]])).pooler_output
        type(tower).forward = counted
        try:
            with frames_remembered(asker.prompter.model):
                tower(pixels[: 2 * 64], grid_thw=torch.tensor([[2, 8, 8]]))
                found = tower(pixels, grid_thw=torch.tensor([[3, 8, 8], [2, 8, 8]])).pooler_output
                again = tower(pixels.flip(0)[-64:].flip(0), grid_thw=torch.tensor([[1, 8, 8]])).pooler_output
        finally:
            type(tower).forward = stock
    assert calls == [2, 3]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, expected[:16], atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(tower)


def test_named_things() -> None:
    assert named_things("what is there with the bell?") == ["a bell"]
    assert named_things("does an owl appear?") == ["an owl"]
    assert named_things("what appears for a moment?") == []


def test_model_relevance_is_the_probability_of_yes(asker: Asker) -> None:
    model, processor = asker.model, asker.prompter.processor
    frames = np.random.default_rng(1).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    found = asker.relevance(frames, "which way does the bell move?")
    text = "USER: <|vision_start|><|image_pad|><|vision_end|>\nis there a bell? ASSISTANT:"
    for frame, p in zip(frames, found, strict=True):
        inputs = processor(text=[text], images=[frame], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        yes = processor.tokenizer.get_vocab()["yes"]
        assert p == pytest.approx(float((logits[yes] - logits.logsumexp(0)).exp()), rel=1e-4)
    assert asker.relevance(frames, "what appears for a moment?").tolist() == [0, 0, 0]


def test_frames_that_are_equally_relevant_are_spread_by_quota() -> None:
    frames = np.zeros((30, 4, 4, 3), np.uint8)
    clip = Clip(np.arange(30.0), frames, 30.0, question="what appears?")
    chosen = create_selector("quota", relevance=lambda f, q: np.zeros(len(f))).select(clip, 3)
    assert chosen.indices.tolist() == [5, 15, 25]


def test_choice_is_judged_by_what_is_known(asker: Asker, questions: list[video.VideoExample]) -> None:
    for example in questions:
        chooser = asker.chooser(example)
        assert chooser.clip.times.tolist() == [i / example.scene.fps for i in range(CANDIDATES)]
        selection = parse_selection("motion", 5)
        chosen = chooser.choose(selection)
        times = [i / example.scene.fps for i in chosen.indices.tolist()]
        spans = example.relevant
        hit = [any(start <= t < stop for t in times) for start, stop in spans]
        assert chooser.recall(chosen) == (sum(hit) / len(hit) if hit else None)
        known = example.relevance(chooser.clip.times)
        assert chosen.scores is not None
        tau, rho = chooser.agreement([chosen.scores])
        if known.min() == known.max():
            assert tau is None
            assert rho is None
        else:
            assert tau == pytest.approx(kendall_tau(chosen.scores, known))
            assert rho == pytest.approx(spearman_rho(chosen.scores, known))
            draws = [
                np.asarray(create_selector("random", seed=s).select(_clip(chooser), 1).scores)
                for s in range(3)
            ]
            assert chooser.random_agreement()[0] == pytest.approx(
                np.mean([kendall_tau(d, known) for d in draws])
            )


def test_frames_are_embedded_once_and_captions_count(
    asker: Asker, questions: list[video.VideoExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    stock = Colours.frames
    monkeypatch.setattr(Colours, "frames", lambda self, f: calls.append(len(f)) or stock(self, f))
    chooser = asker.chooser(questions[1])
    plain, captioned = (
        chooser.choose(parse_selection(text, 5)) for text in ("keyscore", "keyscore:captions=True")
    )
    assert calls == [CANDIDATES]
    clip = Clip(
        chooser.clip.times,
        chooser.clip.frames,
        chooser.clip.duration,
        captions=questions[1].caption,
        embedder=Colours(),
    )
    literal = create_selector("keyscore").select(clip, 5)
    assert captioned.scores is not None
    assert captioned.scores.tolist() == literal.scores.tolist()
    assert plain.scores.tolist() != literal.scores.tolist()
    chooser.fresh().choose(parse_selection("keyscore", 5))
    assert calls == [CANDIDATES] * 3


def _clip(chooser: Any) -> Clip:
    return Clip(chooser.clip.times, chooser.clip.frames, chooser.clip.duration)


def test_answers_are_those_of_the_stock_model_alone(
    asker: Asker, questions: list[video.VideoExample]
) -> None:
    """Judge: the model without any memory, one question at a time."""
    settings = plan(["uniform", "random"], [6], None, None, CANDIDATES)
    assert [s.name for s in settings] == ["dense", NO_VIDEO, "uniform 6", "random 6"]
    settings.append(VideoSetting(plan(None, None, ["stride"], [8], CANDIDATES)[2].tokens))
    counts: list[int] = []
    found = asker.ask(questions, settings, counts.append)
    assert sum(counts) == len(settings) * len(questions)
    model, prompter = asker.model, asker.prompter
    for setting, said in zip(settings, found, strict=True):
        for example, one in zip(questions, said, strict=True):
            chooser = asker.chooser(example)
            with setting.applied(model):
                inputs = asker.inputs([chooser], setting)
                if setting.blank:
                    assert inputs["pixel_values_videos"].std() == 0
                with torch.no_grad():
                    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert one.text == prompter.texts(inputs, output)[0]
            assert one.error is None
            assert len(one.times) == (setting.selection.frames or CANDIDATES)
    assert all(one.recall in (None, 1.0) for one in found[0])
    assert all(one.recall is None for one in found[1])


def test_a_failing_question_costs_one_answer(
    asker: Asker, questions: list[video.VideoExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = type(asker.model).generate
    (bad,) = asker.prompter.processor.tokenizer(" moment", add_special_tokens=False)["input_ids"]

    def generate(self: Any, **inputs: Any) -> Any:
        if (inputs["input_ids"] == bad).any():
            raise RuntimeError("no such moment")
        return stock(self, **inputs)

    monkeypatch.setattr(type(asker.model), "generate", generate)
    (said,) = asker.ask(questions, [VideoSetting(selection=Selection("uniform", (), 2))])
    assert [one.error for one in said] == ["RuntimeError: no such moment", None, None, None]
    assert said[0].correct == 0


def test_default_plan_compares_equal_numbers_of_tokens() -> None:
    settings = plan(None, None, None, None, 120)
    assert settings[0] == VideoSetting()
    assert settings[1].method == NO_VIDEO
    pruned = [s for s in settings if s.tokens.keep is not None]
    assert {(s.selection.frames or 120) * resolve_keep(s.tokens.keep or 1, TOKENS) for s in pruned} == {192}
    whole = {s.selection.frames for s in settings[2:] if s.tokens.keep is None}
    assert whole == {12, 6}
    assert len({s.name for s in settings}) == len(settings)


def test_plan_of_what_is_asked_for() -> None:
    names = [s.name for s in plan(["uniform", "all"], [0.1, 3], ["evs", "dense"], [2, 0.5], 30)]
    assert names[:2] == ["dense", NO_VIDEO]
    assert names[2:] == [
        f"uniform {frames}{tokens}" for frames in (3,) for tokens in (", evs keep=2", ", evs keep=0.5", "")
    ] + ["evs keep=2", "evs keep=0.5"]
    assert plan(None, None, ["evs"], None, 30)[2].tokens.keep == 0.1
    assert parse_selection("keyscore:captions=True", 3).captions
    assert parse_selection("quota:relevance=embedder", 3).relevance == "embedder"
    assert parse_selection("mllm-select", 3).relevance is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((["keyscor"], None, None, None), UnknownMethodError),
        ((["uniform:seed=1"], None, None, None), InvalidOptionError),
        ((["quota:relevance=me"], None, None, None), InvalidOptionError),
        ((["keyscore:captions=1"], None, None, None), InvalidOptionError),
        ((["all:seed=1"], None, None, None), InvalidOptionError),
        ((None, [0], None, None), InvalidOptionError),
        ((None, [31], None, None), InvalidOptionError),
        ((None, None, ["evz"], None), UnknownMethodError),
        ((None, None, ["no-image"], None), InvalidOptionError),
        ((None, None, ["evs"], [0]), InvalidOptionError),
        ((None, None, None, [0.5]), InvalidOptionError),
    ],
)
def test_plan_refuses(arguments: Any, error: type[VTPruneError]) -> None:
    with pytest.raises(error):
        plan(*arguments, 30)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "CANDIDATES", CANDIDATES)
    monkeypatch.setattr(command, "ROUNDS", 1)
    monkeypatch.setattr(suite, "TIMED_CLIPS", 1)
    monkeypatch.setattr(suite, "PART", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    arguments = ["eval", "--suite", "video", "--model", str(folder), "--split", "val", "--limit", "2"]
    arguments += ["--task", "needle", "--task", "known", "--jobs", "1", "--output", str(out)]
    arguments += ["--select", "uniform", "--select", "motion", "--frames", "6"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    rows = [read_line(line) for line in (out / "results.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(said) == 4 * 4
    assert [row.task for row in rows] == ["all", "needs vision", "needle", "known"] * 4
    for row in rows:
        mine = [p for p in said if (p["select"], p["method"]) == (row.select, row.method)]
        mine = [
            p
            for p in mine
            if row.task in ("all", p["task"]) or (row.task == "needs vision" and p["needs_vision"])
        ]
        right = [float(p["prediction"] == p["answer"]) for p in mine]
        assert [p["correct"] for p in mine] == right
        assert (row.n, row.accuracy) == (len(mine), sum(right) / len(right))
        recalls = [p["recall"] for p in mine if p["recall"] is not None]
        assert row.recall == (sum(recalls) / len(recalls) if recalls else None)
        assert row.visual_tokens_in == row.visual_tokens_out == TOKENS * (row.frames or CANDIDATES)
        assert row.candidates == CANDIDATES
        assert (row.select_ms is None) == (row.select == "all")
        assert (row.tau is None) == (row.select != "motion" or row.task == "known")
        if row.tau is not None:
            assert -1 <= row.tau <= 1
            assert row.random_tau is not None
            assert math.isfinite(row.random_tau)
    assert {p["frames"] for p in said} == {None, 6}
    assert "needs vision" in shown
    assert (out / "table.md").read_text().count("| motion, 6 |") == 2
    compared = [json.loads(line) for line in (out / "comparisons.jsonl").read_text().splitlines()]
    assert {(c["select"], c["other"], c["task"], c["frames"]) for c in compared} == {
        ("motion", "uniform", "needle", 6),
        ("motion", "uniform", "all", 6),
    }

    # Cut off in the second part, and taken up again: only that is asked, and the answers are the same.
    lines = (out / "predictions.jsonl").read_text().splitlines()
    (out / "predictions.jsonl").write_text("\n".join(lines[:-1]) + '\n{"split": "va')
    asked: list[int] = []
    ask = Asker.ask
    monkeypatch.setattr(
        Asker, "ask", lambda self, part, *rest: asked.append(len(part)) or ask(self, part, *rest)
    )
    assert main([*arguments, "--resume"]) == 0
    assert asked == [2]
    assert (out / "predictions.jsonl").read_text().splitlines() == lines
    again = [read_line(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r.task, r.accuracy, r.recall, r.tau) for r in again] == [
        (r.task, r.accuracy, r.recall, r.tau) for r in rows
    ]
    assert main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "was run with seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "video", "--task", "count"], "--task count is not of the video suite"),
        (["--suite", "video", "--split", "unseen_style"], "--split unseen_style is not of the video suite"),
        (["--suite", "video", "--compare", "evs"], "--compare is of the picture suite"),
        (["--select", "uniform"], "add --suite video"),
        (["--task", "needle"], "--task needle is not of the picture suite"),
    ],
)
def test_arguments_of_the_other_suite_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_committed_tables_are_those_of_the_committed_rows() -> None:
    root = Path(__file__).resolve().parents[1]
    rows = read_rows(root / "eval" / "results" / "video.jsonl")
    page = (root / "docs" / "video.md").read_text(encoding="utf-8")
    shown = page.split("eval/results/video.jsonl -->\n")[1].split("\n<!-- /video -->")[0]
    assert shown == markdown(rows, rows[0].split).strip()
    assert rows[0].command in page

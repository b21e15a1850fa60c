"""lmms-eval: the model `vtprune`, exported tasks, run files and published figures.

What needs lmms-eval itself is skipped without it; `.ci/lmms` runs it all.
"""

import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import DOCS, ROOT, blocks, commands
from PIL import Image

import vtprune
from vtprune.errors import InvalidOptionError, UnknownMethodError, UnsupportedMethodError, VTPruneError
from vtprune.eval import cli, world
from vtprune.eval.accuracy import ask, make_batches
from vtprune.eval.cli import main
from vtprune.eval.lmms import arguments, conversations, export, generation, likelihood, published, runs, tally
from vtprune.eval.lmms import command as lmms_command
from vtprune.eval.prompts import EvaluationError, Prompter, load_model
from vtprune.eval.settings import Setting

LIMIT = 5
REFERENCE = str(world.reference_dir("llava"))
needs_lmms = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed; .ci/lmms tests with it"
)


@pytest.fixture(scope="module")
def reference():
    return load_model(REFERENCE, "cpu", "auto")


@pytest.fixture(scope="module")
def questions():
    return world.examples("test", LIMIT, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The exported tasks, with Hugging Face's caches beside them."""
    pytest.importorskip("pyarrow", reason="parquet files need pyarrow, which comes with lmms-eval")
    place = tmp_path_factory.mktemp("lmms")
    export.export_tasks(place / "tasks", ["test"], LIMIT, 0)
    before = dict(os.environ)
    os.environ.update(HF_HOME=str(place / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    yield place
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def answered(reference, questions):
    """Answers of `vtprune eval` to the exported questions, (kind, number of the kind) -> (text, right)."""
    model, processor = reference
    prompter = Prompter(model, processor)
    (outcome,) = ask(
        model, prompter, questions, make_batches(prompter, questions, 8), [Setting("vtc-cls", 16)]
    )
    found, seen = {}, {}
    for number, example in enumerate(questions):
        place = seen.get(example.kind, 0)
        seen[example.kind] = place + 1
        found[example.kind, place] = outcome.texts[number], outcome.correct[number]
    return found


# ------------------------------------------------------------------------------------------------- model arguments


def test_model_arguments_give_a_setting():
    plan, setting = arguments.parse(
        {"pretrained": "x", "method": "fastv:layer=3", "keep": 0.25, "batch_size": "4", "device": None}
    )
    assert (plan.pretrained, plan.batch_size, plan.device) == ("x", 4, None)
    assert setting == Setting("fastv", 0.25, (("layer", 3),))
    assert arguments.parse({"pretrained": "x"})[1] == Setting("dense")
    assert arguments.parse({"pretrained": "x", "method": "fastv", "keep": 8, "layer": "0.5"})[1] == Setting(
        "fastv", 8, (("layer", 0.5),)
    )
    assert arguments.parse({"pretrained": "x", "method": "prumerge"})[1] == Setting("prumerge")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "fastv", "keep": 8}, InvalidOptionError, "needs pretrained="),
        ({"pretraned": "x"}, InvalidOptionError, "not 'pretraned'"),
        ({"pretrained": "x", "method": "fastvv", "keep": 8}, UnknownMethodError, "fastv"),
        ({"pretrained": "x", "method": "vtc-cls"}, VTPruneError, "keep"),
        (
            {"pretrained": "x", "method": "fastv", "keep": 8, "layr": 2},
            InvalidOptionError,
            "Did you mean 'layer'",
        ),
        (
            {"pretrained": "x", "method": "fastv", "keep": 8, "batchsize": 2},
            InvalidOptionError,
            "'batch_size'",
        ),
        ({"pretrained": "x", "method": "fastv:layer=2", "keep": 8, "layer": 3}, InvalidOptionError, "twice"),
        ({"pretrained": "x", "keep": 8}, InvalidOptionError, "without a method"),
        ({"pretrained": "x", "scorer": "cls"}, InvalidOptionError, "without a method"),
        ({"pretrained": "x", "method": "keep-all", "keep": 8}, InvalidOptionError, "takes no keep"),
        ({"pretrained": "x", "method": "downsample"}, InvalidOptionError, "needs keep"),
        ({"pretrained": "x", "method": "no-image", "layer": 1}, InvalidOptionError, "takes no options"),
        ({"pretrained": "x", "method": "fastv", "keep": -1}, VTPruneError, "-1"),
        ({"pretrained": "x", "method": "random-ltd", "keep": 0.5}, UnsupportedMethodError, "training"),
        ({"pretrained": "x", "batch_size": "auto"}, InvalidOptionError, "batch_size='auto'"),
        ({"pretrained": "x", "max_batch_size": 4}, InvalidOptionError, "max_batch_size"),
        ({"pretrained": "x", "video_as": "sound"}, InvalidOptionError, "video or pictures"),
    ],
)
def test_wrong_model_arguments_say_what_to_do(given, error, words):
    with pytest.raises(error, match=words):
        arguments.parse(given)


def test_generation_settings_of_a_task():
    greedy = generation.wanted(
        {"until": ["\n\n", "END"], "max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": False}
    )
    assert greedy.options == {
        "num_beams": 1,
        "max_new_tokens": 16,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "do_sample": False,
    }
    assert greedy.cut("a END b\n\nc") == "a "
    hot = generation.wanted({"temperature": 0.7, "num_beams": 2, "image_aspect_ratio": "original"})
    assert hot.options["do_sample"]
    assert hot.options["temperature"] == 0.7
    assert hot.options["num_beams"] == 2
    assert hot.options["max_new_tokens"] == generation.NEW_TOKENS
    assert hot.ignored == ("image_aspect_ratio",)
    assert not generation.wanted({"temperature": 0.7, "do_sample": False}).options["do_sample"]
    with pytest.raises(InvalidOptionError, match="Did you mean 'max_new_tokens'"):
        generation.wanted({"max_new_token": 3})
    with pytest.raises(InvalidOptionError, match="until=3"):
        generation.wanted({"until": 3})
    assert generation.same([{"a": 1, "b": 2}, {"a": 2}, {"b": 2, "a": 1}]) == [[0, 2], [1]]


# --------------------------------------------------------------------------------------------------- conversations


def _asked(images, text):
    content = [{"type": "image", "url": image} for image in images]
    return conversations.conversation(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    )


@pytest.mark.parametrize("method", [None, "vtc-cls", "fastv"])
def test_rows_with_different_numbers_of_pictures_answer_as_alone(reference, questions, method):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    pictures = [example.image for example in questions]
    talks = [
        _asked(pictures[:1], questions[0].question),
        _asked(pictures[1:4], "what is at the top left ?"),
        _asked(pictures[4:6], questions[4].question),
        _asked([], "how many ?"),
    ]
    batches = list(conversations.alike(talks, 8))
    assert batches == [[0, 1, 2], [3]]

    def logits(numbers):
        inputs = prompter.rows([talks[number] for number in numbers])
        with torch.no_grad():
            return model(**inputs).logits[:, -1]

    patch = vtprune.patch(model, method or "keep-all", **({"keep": 20} if method else {}))
    with patch:
        together = logits([0, 1, 2])
        counts = tally.of_report(patch.report(), 3)
        alone = torch.cat([logits([number]) for number in (0, 1, 2)])
        logits([3])  # text only
        assert tally.of_report(patch.report(), 1) == [tally.Tokens(0, 0, 0, 0.0)]
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    assert [one.visual_tokens for one in counts] == [144, 432, 288]
    assert [one.visual_tokens_out for one in counts] == ([20, 60, 40] if method else [144, 432, 288])


def test_the_prompt_is_that_of_vtprune_eval(reference, questions):
    model, processor = reference
    ours = Prompter(model, processor).inputs(
        [e.image for e in questions[:6]], [e.question for e in questions[:6]]
    )
    theirs = conversations.ChatPrompter(model, processor).rows(
        [_asked([e.image], e.question) for e in questions[:6]]
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_cannot_be_shown_is_refused(reference):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    picture = Image.new("RGB", (96, 96))
    with pytest.raises(EvaluationError, match="'audio'"):
        conversations.conversation([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(EvaluationError, match="2 places <image> for 1 images"):
        prompter.rows([_asked([picture], "what is in <image> ?")])
    film = conversations.conversation(
        [
            {
                "role": "user",
                "content": [{"type": "video", "url": [picture] * 3}, {"type": "text", "text": "?"}],
            }
        ]
    )
    with pytest.raises(EvaluationError, match="video_as=pictures"):
        prompter.rows([film])
    shown = conversations.ChatPrompter(model, processor, max_frames=2, video_as="pictures").rows([film])
    assert shown["pixel_values"].shape[0] == 2


def test_frames_of_files_folders_and_spans(tmp_path):
    pytest.importorskip("av", reason="video files need PyAV")
    from vtprune.eval.world.video.files import write

    frames = [np.full((96, 96, 3), 10 * second, np.uint8) for second in range(20)]
    path = write(tmp_path / "a.mp4", frames, 1)
    whole = conversations.frames_of(str(path), 4)
    part = conversations.frames_of({"url": str(path), "start_time": 10, "end_time": 14}, 4)
    assert [round(float(f.mean()) / 10) for f in whole.frames] == [2, 7, 12, 17]
    assert [round(float(f.mean()) / 10) for f in part.frames] == [10, 11, 12, 13]
    (tmp_path / "frames").mkdir()
    for place, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{place:03}.png")
    assert [int(f.mean()) for f in conversations.frames_of(str(tmp_path / "frames"), 4).frames] == [
        20,
        70,
        120,
        170,
    ]
    with pytest.raises(EvaluationError, match="no part of it"):
        conversations.frames_of({"url": str(path), "start_time": 14, "end_time": 10}, 4)
    with pytest.raises(EvaluationError, match="int"):
        conversations.frames_of(3, 4)


# ------------------------------------------------------------------------------------------------------ likelihood


def _losses(reference, talks, ends):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    texts = [prompter.text(talk) for talk in talks]
    return likelihood.continuation_losses(model, processor.tokenizer, prompter.rows(talks), texts, ends)


def test_losses_are_those_of_one_unpadded_pass(reference, questions):
    """Judge: prompt and continuation in one sequence, one row, no cache."""
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    talks = [_asked([e.image], e.question) for e in questions[:4]]
    ends = [" " + questions[0].answer, " " + questions[1].answer, " pizza dog", " no"]
    found = _losses(reference, talks, ends)
    for talk, end, (loss, greedy) in zip(talks, ends, found, strict=True):
        inputs = prompter.rows([talk])
        target = torch.tensor([processor.tokenizer(end, add_special_tokens=False)["input_ids"]])
        ids = torch.cat([inputs["input_ids"], target], 1)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0, -target.shape[1] - 1 : -1]
        log = logits.log_softmax(-1).gather(-1, target[0][:, None])
        assert loss == pytest.approx(-float(log.mean()), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == target[0]).all())
    assert found[0][1] or found[1][1], "a trained model finds a right answer most likely"
    assert not found[2][1]


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
def test_losses_under_pruning_depend_on_neither_the_batch_nor_the_answer(reference, questions, method):
    model, _ = reference
    talks = [_asked([e.image], e.question) for e in questions[:3]]
    ends = [" yes", " pizza dog", " three"]
    with vtprune.patch(model, method, keep=12) as patch:
        together = _losses(reference, talks, ends)
        alone = [_losses(reference, [t], [e])[0] for t, e in zip(talks, ends, strict=True)]
        kept = []
        for end in (" yes", " pizza dog"):
            _losses(reference, talks[:1], [end])
            kept.append(next(iter(patch.report().images[0].kept.values())).tolist())
    assert kept[0] == kept[1]
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], abs=1e-4)
    assert [loss for loss, _ in together] != pytest.approx(
        [loss for loss, _ in _losses(reference, talks, ends)], abs=1e-4
    )


def test_an_empty_continuation_is_refused(reference, questions):
    with pytest.raises(EvaluationError, match="no tokens"):
        _losses(reference, [_asked([questions[0].image], "?")], [""])


# ---------------------------------------------------------------------------------------------------------- export


def test_export_holds_exactly_the_questions_of_vtprune_eval(folder, questions):
    from pyarrow import parquet

    for kind in world.KINDS:
        table = parquet.read_table(folder / "tasks" / "data" / f"{export.task_name(kind, 'test')}.parquet")
        wanted = [example for example in questions if example.kind == kind]
        rows = table.to_pylist()
        assert [(r["question"], r["answer"], r["scene_seed"]) for r in rows] == [
            (e.question, e.answer, e.scene_seed) for e in wanted
        ]
        for row, example in zip(rows, wanted, strict=True):
            picture = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert np.array_equal(np.asarray(picture), np.asarray(example.image))


def test_export_refuses_what_the_world_does_not_have(tmp_path):
    pytest.importorskip("pyarrow", reason="parquet files need pyarrow, which comes with lmms-eval")
    with pytest.raises(EvaluationError, match="seed must be between"):
        export.export_tasks(tmp_path, ["test"], 1, seed=5000)
    with pytest.raises(EvaluationError, match="raise the limit"):
        export.export_tasks(tmp_path, ["test"], 0)


def test_tasks_without_lmms_eval_say_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(lmms_command, "installed", lambda: False)
    monkeypatch.setattr("vtprune.eval.lmms.tasks.installed", lambda: False)
    assert main(["eval", "--task", "coumt"]) == 2
    said = capsys.readouterr().err
    assert "did you mean count?" in said
    assert "pip install 'vtprune[lmms]'" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "gqa", "--suite", "video"], "--suite"),
        (["--task", "gqa", "--split", "test"], "--split"),
        (["--task", "gqa", "--seed", "3"], "--seed"),
        (["--task", "gqa", "--jobs", "2"], "docs/lmms-eval.md"),
        (["--task", "gqa", "--compare", "x"], "--compare"),
        (["--task", "gqa", "--frames", "0.5"], "one whole number"),
        (["--include-path", "."], "add --task"),
        (["--run", "llava-1.5"], "'llava-1.5-7b'"),
    ],
)
def test_options_that_do_not_fit_tasks_of_lmms_eval_are_refused(options, words, capsys):
    assert main(["eval", *options]) == 2
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- run files and figures


@pytest.mark.parametrize("name", runs.shipped())
def test_run_files_hold(name):
    run = runs.read(name)
    assert run.about
    for method in run.methods:
        for budget in run.keep:
            assert arguments.setting(method, budget).keep == budget


def test_run_files_of_the_published_protocols():
    pictures, clips = runs.read("llava-1.5-7b"), runs.read("llava-onevision-7b")
    assert pictures.keep == [192, 128, 64]
    assert clips.keep == [0.25, 0.15, 0.1]
    papers = published.BENCHMARKS
    assert {
        papers[n].task for n in ("GQA", "MMB", "MME", "POPE", "SQA", "VQAv2", "TextVQA", "VizWiz", "SEED")
    } == set(pictures.tasks)
    assert {
        papers[n].task for n in ("MVBench", "Video-MME", "MLVU", "EgoSchema", "LongVideoBench", "NExT-QA")
    } == set(clips.tasks)


def test_options_replace_what_a_run_file_says_also_with_a_default_value():
    def plan(*options):
        given = cli._parser().parse_args(["eval", "--run", "llava-1.5-7b", *options])
        return lmms_command._plan(given)

    assert (plan().device, plan().dtype) == ("cuda", "float16")
    assert (plan("--device", "cpu").device, plan("--dtype", "auto").dtype) == ("cpu", "auto")
    assert plan("--device", "cuda:1").dtype == "float16"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: [gqa]\nmethods: [fastv]\n", "list of keep"),
        ("tasks: [gqa]\nmethods: [fastvv]\nkeep: [64]\n", "Did you mean 'fastv'"),
        ("tasks: [gqa]\nmethods: [fastv]\nkeep: [-3]\n", "-3"),
        ("tasks: [gqa]\nmethods: [fastv]\nkeep: [64]\nbatchsize: 3\n", "Did you mean 'batch_size'"),
        ("tasks: [gqa]\nmethods: [fastv]\nkeep: [64]\nframes: 0\n", "frames must be"),
        ("tasks: []\nmethods: [fastv]\nkeep: [64]\n", "list of tasks"),
        ("tasks: [1]\nmethods: [fastv]\nkeep: [64]\n", "list of str"),
        ("- a\n", "must hold names"),
        ("a: [\n", "no YAML file"),
    ],
)
def test_wrong_run_files_are_refused(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(VTPruneError, match=words):
        runs.read(str(path))


def test_published_figures_are_whole_and_name_their_sources():
    figures = published.load()
    for one in figures.figures:
        assert one.sources, one
        assert set(one.sources) <= set(figures.sources), one
        assert one.values, one
        assert set(one.values) <= set(published.BENCHMARKS), one
        assert one.model in published.models()
        assert one.key is None or one.key in {"dense", "no-image", *vtprune.list_methods()}, one
        assert one.baseline is None or figures.dense(one) is not None, one
        for name, value in one.values.items():
            assert 0 < value < (2800 if name.startswith("MME") else 100), one
    assert set(figures.sources) == {key for one in figures.figures for key in one.sources}


# From VTC-CLS' own figure, FasterVLM's EVAL.md, HoliTom's and VidCom2's figures, and the HoloV and QCPruner papers.
@pytest.mark.parametrize(
    ("model", "tokens", "method", "source", "benchmark", "value"),
    [
        ("LLaVA-1.5-7B", "64", "VTC-CLS", "vtc-cls", "POPE", 78.8),
        ("LLaVA-1.5-7B", "128", "VTC-CLS", "vtc-cls", "SEED", 62.2),
        ("LLaVA-1.5-7B", "144", "FasterVLM", "fastervlm", "MME perception", 1433.76),
        ("LLaVA-1.5-7B", "58", "FastV", "fastervlm", "GQA", 51.2),
        ("LLaVA-1.5-7B", "64", "FastV", "holov", "POPE", 48.0),
        ("LLaVA-1.5-7B", "64", "FastV", "calibration", "POPE", 36.1),
        ("LLaVA-1.5-7B", "64", "CDPruner", "qcpruner", "MME perception", 1403),
        ("LLaVA-1.5-7B", "192", "DART", "holov", "MME", 1856),
        ("LLaVA-OneVision-7B", "25 %", "DyCoke", "holitom", "EgoSchema", 59.5),
        ("LLaVA-OneVision-7B", "10 %", "VisionZip", "holitom", "Video-MME", 53.4),
        ("LLaVA-OneVision-7B", "25 %", "Random", "vidcom2", "MLVU", 59.7),
        ("LLaVA-OneVision-7B", "15 %", "SparseVLM", "vidcom2", "Video-MME", 53.4),
    ],
)
def test_published_figures_stand_as_in_their_sources(model, tokens, method, source, benchmark, value):
    (found,) = [
        one
        for one in published.load().figures
        if (one.model, one.tokens, one.method) == (model, tokens, method) and source in one.sources
    ]
    assert found.values[benchmark] == value


def _row(method, keep, task, metric, value, **other):
    return {
        "model": "llava-hf/llava-1.5-7b-hf",
        "method": method,
        "keep": keep,
        "task": task,
        "metric": metric,
        "accuracy": value,
        "mean_tokens_llm": 64.0,
        "mean_layer_average": 64.0,
        "n": 10,
        "limit": None,
        **other,
    }


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_outcomes_stand_beside_published_figures(tmp_path, capsys):
    rows = [
        _row("dense", None, "gqa", "exact_match", 0.60),
        _row("vtc-cls", 64, "gqa", "exact_match", 0.54),
        _row("vtc-cls", 64, "mme", "mme_perception_score", 1400.0),
        _row("vtc-cls", 64, "pope", "pope_accuracy", 0.8),  # papers report F1
    ]
    path = _write(tmp_path / "results.jsonl", rows)
    outcomes = published.read_outcomes(path)
    model = published.model_of(outcomes, path)
    done = published.compare(published.load(), outcomes, model)
    (line,) = [one for one in done.lines if one.figure.key == "vtc-cls"]
    assert (line.benchmark, line.measured, line.published) == ("GQA", pytest.approx(54.0), 55.7)
    assert line.kept == pytest.approx(0.9)
    assert line.kept_published == pytest.approx(55.7 / 62.0)
    assert {one.benchmark for one in done.lines} == {"GQA"}
    assert main(["published", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "-1.7" in shown
    assert "source, vtc-cls: github.com/THU-MIG/VTC-CLS" in shown
    assert "VTC-CLS: tokens that enter the language model" in shown


def test_comparison_says_what_it_cannot_know(tmp_path, capsys):
    path = _write(tmp_path / "results.jsonl", [_row("vtc-cls", 63, "gqa", "exact_match", 0.5)])
    assert main(["published", str(path)]) == 2
    assert "it has GQA under vtc-cls" in capsys.readouterr().err
    path = _write(tmp_path / "other.jsonl", [_row("vtc-cls", 64, "gqa", "exact_match", 0.5, model="mine")])
    assert main(["published", str(path)]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["published", str(path), "--model", "LLaVA-1.5-7B"]) == 0
    path = _write(tmp_path / "bad.jsonl", [{"a": 1}])
    assert main(["published", str(path)]) == 2
    assert "neither" in capsys.readouterr().err
    limited = [
        _row("vtc-cls", 64, "gqa", "exact_match", 0.5, limit=5),
    ]
    outcomes = published.read_outcomes(_write(tmp_path / "few.jsonl", limited))
    assert "--limit" in published.compare(published.load(), outcomes, "LLaVA-1.5-7B").notes[0]
    assert main(["published", "--method", "fastv", "--tokens", "65"]) == 2
    assert "tokens: all, 192" in capsys.readouterr().err


def test_a_group_of_many_tasks_counts_only_when_it_is_whole():
    parts = [
        published.Outcome(
            "m", "random", 0.25, f"mvbench_{i}", "mvbench_accuracy", float(i), 1.0, 1.0, 1, False
        )
        for i in range(20)
    ]
    benchmark = published.BENCHMARKS["MVBench"]
    assert published._value(parts, benchmark) == pytest.approx(9.5)
    assert published._value(parts[1:], benchmark) is None


# ------------------------------------------------------------------------------------------- with lmms-eval itself


@needs_lmms
def test_every_task_of_run_files_and_figures_is_one_of_lmms_eval():
    from vtprune.eval.lmms.tasks import manager

    known = set(manager().all_tasks)
    named = {task for name in runs.shipped() for task in runs.read(name).tasks}
    assert named
    assert named <= known
    assert {benchmark.task for benchmark in published.BENCHMARKS.values()} <= known


@needs_lmms
def test_lmms_eval_finds_the_model_by_its_entry_point():
    from lmms_eval.models import get_model, list_available_models

    assert "vtprune" in list_available_models()
    assert get_model("vtprune").__name__ == "VTPruneChat"
    assert get_model("vtprune", force_simple=True).__name__ == "VTPruneSimple"


def _lmms_eval(folder, out, launcher=(sys.executable,), extra=(), **environment):
    command = [
        *launcher,
        "-m",
        "lmms_eval",
        "--model",
        "vtprune",
        "--model_args",
        f"pretrained={REFERENCE},method=vtc-cls,keep=16",
        "--tasks",
        "vtprune_pictures",
        "--include_path",
        str(folder / "tasks"),
        "--batch_size",
        "8",
        "--output_path",
        str(out),
        "--log_samples",
        "--verbosity",
        "DEBUG",
        *extra,
    ]
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _samples(out):
    found = {}
    for kind in world.KINDS:
        (path,) = out.glob(f"*/*samples_{export.task_name(kind, 'test')}.jsonl")
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            found[kind, sample["doc_id"]] = sample
    return found


@pytest.fixture(scope="module")
def one_process(folder):
    said = _lmms_eval(folder, folder / "one")
    return said, _samples(folder / "one"), next((folder / "one").glob("*/*_results.json"))


@needs_lmms
def test_lmms_eval_gives_the_answers_of_vtprune_eval(one_process, answered):
    said, samples, results = one_process
    assert len(samples) == len(answered) == LIMIT * len(world.KINDS)
    for place, (text, right) in answered.items():
        sample = samples[place]
        given = sample["filtered_resps"]
        assert (given if isinstance(given, str) else given[0]) == text, place
        assert sample["accuracy"] == right, place
    assert 0 < sum(right for _, right in answered.values()) < len(answered), "a test that cannot fail"
    found = json.loads(results.read_text())
    mean = sum(right for _, right in answered.values()) / len(answered)
    assert found["results"]["vtprune_pictures"]["accuracy,none"] == pytest.approx(mean)
    assert f"{len(answered)} requests, {len(answered)} with visual tokens, {len(answered)} pruned" in said


@needs_lmms
def test_samples_and_results_hold_tokens_before_and_after(one_process):
    _, samples, results = one_process
    for sample in samples.values():
        (counts,) = sample["token_counts"]
        assert {name: counts[name] for name in tally.FIELDS} == {
            "visual_tokens": 144,
            "visual_tokens_llm": 16,
            "visual_tokens_out": 16,
            "layer_average_tokens": 16.0,
        }
        assert counts["input_tokens"] > 144
        assert 1 <= counts["output_tokens"] <= 8
    throughput = json.loads(results.read_text())["throughput"]
    assert throughput["avg_visual_tokens"] == 144
    assert throughput["avg_visual_tokens_llm"] == 16
    outcomes = published.read_outcomes(results)
    assert {(one.method, one.keep, one.tokens_llm) for one in outcomes} == {("vtc-cls", 16, 16.0)}


@needs_lmms
def test_two_processes_give_what_one_gives(one_process, folder):
    _, alone, results = one_process
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    )
    # Fewer documents than processes on the last turn: lmms-eval pads with a request that must not count.
    said = _lmms_eval(folder, folder / "two", launcher, ACCELERATE_USE_CPU="true")
    both = _samples(folder / "two")
    assert both.keys() == alone.keys()
    for place in alone:
        assert both[place]["filtered_resps"] == alone[place]["filtered_resps"], place
        assert both[place]["accuracy"] == alone[place]["accuracy"], place
    there = json.loads(next((folder / "two").glob("*/*_results.json")).read_text())["results"]
    here = json.loads(results.read_text())["results"]
    assert {t: v["accuracy,none"] for t, v in there.items()} == {
        t: v["accuracy,none"] for t, v in here.items()
    }
    per_kind = math.ceil(LIMIT / 2)
    assert f"(process 0 of 2): {per_kind * len(world.KINDS)} requests" in said
    assert f"(process 1 of 2): {(LIMIT - per_kind) * len(world.KINDS)} requests" in said


@needs_lmms
def test_vtprune_eval_runs_tasks_of_lmms_eval(folder, answered, tmp_path, capsys):
    out = tmp_path / "out"
    settings = [("--method", name) for name in ("vtc-cls", "random", "downsample", "no-image")]
    given = ["eval", "--task", "vtprune_pictures", "--include-path", str(folder / "tasks"), "--keep", "16"]
    given += [word for pair in settings for word in pair]
    code = main([*given, "--batch-size", "8", "--output", str(out), "--threads", "1"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    whole = {row["method"]: row for row in rows if row["task"] == "vtprune_pictures"}
    mean = sum(right for _, right in answered.values()) / len(answered)
    assert whole["vtc-cls"]["accuracy"] == pytest.approx(mean)
    assert whole["vtc-cls"]["retained"] == pytest.approx(mean / whole["dense"]["accuracy"])
    assert whole["vtc-cls"]["n"] == len(answered)
    assert (whole["vtc-cls"]["mean_tokens_in"], whole["vtc-cls"]["mean_tokens_llm"]) == (144, 16)
    assert (whole["vtc-cls"]["visual_tokens_in"], whole["vtc-cls"]["visual_tokens_out"]) == (144, 16)
    assert whole["vtc-cls"]["flops"] < whole["dense"]["flops"]
    assert whole["random"]["options"] == {"seeds": [0, 1, 2]}
    assert whole["random"]["stderr"] > 0
    assert whole["downsample"]["mean_tokens_llm"] == 16
    assert whole["no-image"]["accuracy"] < 0.5 < whole["dense"]["accuracy"]
    assert whole["vtc-cls"]["versions"]["lmms_eval"]
    assert {row["task"] for row in rows} == {
        "vtprune_pictures",
        *(export.task_name(kind, "test") for kind in world.KINDS),
    }
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    mine = {(r["task"], r["doc_id"]): r for r in records if r["method"] == "vtc-cls"}
    for (kind, place), (text, right) in answered.items():
        record = mine[export.task_name(kind, "test"), place]
        assert record["prediction"] == text
        assert record["metrics"]["accuracy"] == right
        assert record["tokens"]["visual_tokens_out"] == 16
    assert "vtprune_pictures_count" in shown
    from vtprune.eval.lmms.results import read_line

    assert dataclasses.asdict(read_line((out / "results.jsonl").read_text().splitlines()[0])) == rows[0]


@needs_lmms
def test_a_run_file_runs_and_options_replace_it(folder, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "run.yaml"
    path.write_text(
        f"tasks: [vtprune_pictures_count]\nmethods: [fastv]\nkeep: [0.5]\nbatch_size: 2\ninclude_path: [{folder / 'tasks'}]\n"
    )
    given = ["--method", "visionzip:contextual=0.2", "--keep", "20", "--limit", "2", "--threads", "1"]
    assert main(["eval", "--run", str(path), *given, "--output", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["keep"], r["options"], r["n"]) for r in rows] == [
        ("dense", None, {}, 2),
        ("visionzip", 20, {"contextual": 0.2}, 2),
    ]
    assert rows[1]["mean_tokens_llm"] == 20
    assert {row["limit"] for row in rows} == {2}
    assert "not comparable with published figures" in " ".join(capsys.readouterr().out.split())


@needs_lmms
def test_unknown_tasks_name_the_nearest(capsys):
    assert main(["eval", "--task", "gqaa"]) == 2
    assert "'gqa'" in capsys.readouterr().err
    assert main(["eval", "--task", "count", "--task", "gqa"]) == 2
    assert "two runs" in capsys.readouterr().err
    assert main(["eval", "--task", "gqa", "--include-path", "nowhere"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


LIKELY = """\
task: vtprune_likely
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: data/vtprune_pictures_exists.parquet
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.picture
doc_to_text: question
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@needs_lmms
def test_likelihood_tasks_run_and_agree_with_the_generated_answers(
    folder, reference, questions, tmp_path, capsys
):
    (folder / "tasks" / "vtprune_likely.yaml").write_text(LIKELY)
    out = tmp_path / "out"
    given = [
        "eval",
        "--task",
        "vtprune_likely",
        "--include-path",
        str(folder / "tasks"),
        "--method",
        "vtc-cls",
    ]
    assert main([*given, "--keep", "32", "--batch-size", "4", "--output", str(out), "--threads", "1"]) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    model, _ = reference
    asked = [example for example in questions if example.kind == "exists"]
    with vtprune.patch(model, "vtc-cls", keep=32):
        losses = [
            [
                _losses(reference, [_asked([e.image], e.question)], [f" {choice}"])[0][0]
                for choice in ("yes", "no")
            ]
            for e in asked
        ]
    right = [("yes", "no")[int(b < a)] == e.answer for (a, b), e in zip(losses, asked, strict=True)]
    (row,) = [row for row in rows if row["method"] == "vtc-cls"]
    assert row["accuracy"] == pytest.approx(sum(right) / len(right))
    assert row["metric"] == "acc"
    assert row["n"] == len(asked)
    mixed = [*given[:2], "vtprune_likely,vtprune_pictures_exists", *given[3:], "--keep", "32"]
    assert main(mixed) == 2
    assert "two runs" in capsys.readouterr().err


class _Request:
    """A request as lmms-eval makes them."""

    def __init__(self, picture, question, generation_kwargs):
        message = [
            {
                "role": "user",
                "content": [{"type": "image", "url": picture}, {"type": "text", "text": question}],
            }
        ]
        self.args = ("", lambda doc: message, generation_kwargs, 0, "task", "test")
        self.task_name, self.metadata = "task", {}


def _model(reference, setting, **other):
    from vtprune.eval.lmms.model import VTPruneChat

    lm = VTPruneChat.of(*reference, setting, arguments.ModelArguments("", **other))
    lm.task_dict["task"] = {"test": [None]}
    return lm


@needs_lmms
def test_generation_settings_are_honoured(reference, questions):
    lm = _model(reference, Setting("vtc-cls", 64), batch_size=3)
    picture = questions[4].image
    ask_for = [
        {"max_new_tokens": 1},
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "num_beams": 3},
        {"max_new_tokens": 6, "until": ["e"]},
        {"max_new_tokens": 6, "do_sample": True, "temperature": 1e-4},
        {"max_new_tokens": 6},
    ]
    text = next(e for e in questions if e.kind == "text")
    requests = [_Request(text.image, text.question, one) for one in ask_for]
    requests.append(_Request(picture, questions[4].question, {"max_new_tokens": 6}))
    found = lm.generate_until(requests)
    assert found[0].token_counts.output_tokens == 1
    assert found[1].text == found[5].text == found[4].text
    assert world.score(found[1].text, text.answer)
    assert found[2].token_counts.visual.visual_tokens_out == 64
    assert found[3].text == found[1].text.split("e")[0].strip()
    assert lm.tally.requests == len(requests)
    with pytest.raises(InvalidOptionError, match="max_new_tokens"):
        lm.generate_until([_Request(picture, "?", {"max_new_token": 3})])


@needs_lmms
def test_a_run_that_prunes_nothing_is_an_error(reference, questions):
    request = _Request(questions[0].image, questions[0].question, {"max_new_tokens": 2})
    with pytest.raises(vtprune.InertPruningError, match="removed no visual token of 1 requests"):
        _model(reference, Setting("vtc-cls", 144)).generate_until([request])
    _model(reference, Setting("keep-all")).generate_until([request])
    _model(reference, Setting("vtc-cls", 1.0)).generate_until([request])
    dense = _model(reference, Setting("dense")).generate_until([request])
    assert dense[0].token_counts.visual == tally.Tokens(144, 144, 144, 144.0)


@needs_lmms
def test_tasks_of_several_rounds_are_refused(reference):
    with pytest.raises(vtprune.UnsupportedCallError, match="several rounds"):
        _model(reference, Setting("dense")).generate_until_multi_round([])


@needs_lmms
def test_a_method_that_the_model_cannot_take_is_told_at_once():
    from vtprune.eval.lmms.model import VTPruneChat

    model = str(world.reference_dir("qwen2-vl"))
    with pytest.raises(UnsupportedMethodError):
        VTPruneChat(pretrained=model, method="fastervlm", keep=4, device="cpu")
    with pytest.raises(EvaluationError, match="cannot load"):
        VTPruneChat(pretrained="nowhere", device="cpu")


CLIPS = """\
task: vtprune_clips
dataset_path: json
dataset_kwargs:
  data_files:
    test: clips.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function clips.shown
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: []
  max_new_tokens: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@needs_lmms
def test_video_tasks_run_in_batches(folder, tmp_path):
    from vtprune.eval.world import video

    place = folder / "clips"
    place.mkdir()
    asked = video.examples("test", 4, ["when"], 0, 120)
    docs = [
        {"video": str(e.path(place / "files")), "question": e.question, "answer": e.answer} for e in asked
    ]
    (place / "clips.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (place / "clips.py").write_text("def shown(doc):\n    return [doc['video']]\n")
    (place / "clips.yaml").write_text(CLIPS)
    answers = []
    for size in ("4", "1"):
        out = tmp_path / size
        given = ["eval", "--task", "vtprune_clips", "--include-path", str(place), "--method", "divprune"]
        given += ["--model", str(world.reference_dir("qwen2-vl")), "--keep", "0.5", "--frames", "12"]
        assert main([*given, "--batch-size", size, "--output", str(out), "--threads", "1"]) == 0
        records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        answers.append([(r["method"], r["doc_id"], r["prediction"]) for r in records])
        (tokens,) = {
            json.dumps(r["tokens"]) for r in records if r["method"] == "divprune" and r["doc_id"] == 0
        }
        counts = json.loads(tokens)
        assert 0 < counts["visual_tokens_out"] < counts["visual_tokens"]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8


def test_the_package_ships_what_it_reads():
    assert Path(published.FILE).is_file()
    assert set(runs.shipped()) == {"llava-1.5-7b", "llava-1.5-7b-quick", "llava-onevision-7b"}


# ------------------------------------------------------------------------------------------------- documentation

RUN_FILE = next(b.text for b in blocks(DOCS / "lmms-eval.md") if b.language == "yaml")
SHOWN = {
    f"{block} {' '.join(words)[:50]}": words
    for page in (ROOT / "README.md", DOCS / "lmms-eval.md")
    for block in blocks(page)
    if block.reason == "needs lmms-eval"
    for line, _ in commands(block)
    for words in line
}
TASKS = "vtprune_pictures_count,vtprune_pictures_text"
# What a command names that is not here, or is too large for a test -> what stands in for it. 192 is more than all tokens here.
INSTEAD = {"gqa,pope": TASKS, "gqa": TASKS, "cuda": "cpu", "float16": "float32", "192": "96"}


def _offline(words, folder):
    """A command of the documentation on what is here, and what it needs of the environment."""
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = [
        INSTEAD.get(word, word)
        .replace("llava-hf/llava-1.5-7b-hf", REFERENCE)
        .replace("=$DIR,", f"={REFERENCE},")
        .replace("=DIR,", f"={REFERENCE},")
        for word in words
    ]
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    of_lmms_eval = words[0] == "lmms-eval" or "lmms_eval" in words
    if of_lmms_eval:
        words += ["--limit", "2", "--verbosity", "DEBUG"]
        words += [] if "--include_path" in words else ["--include_path", "tasks/"]
        words += [] if "--device" in words else ["--device", "cpu"]
    elif words[:2] == ["vtprune", "eval"]:
        if "--task" in words or "--run" in words:
            words += ["--include-path", "tasks/"]
        if "--run" in words:
            words += ["--model", REFERENCE, "--device", "cpu", "--dtype", "float32", "--task", TASKS]
            words += ["--method", "vtc-cls", "--keep", "0.5"]
        words += ["--limit", "2"]
    elif words[:2] == ["vtprune", "export-tasks"]:
        words += ["--limit", "2"]
    elif words[:2] == ["vtprune", "published"]:
        # Written by an earlier command, but about tasks for which nothing was published.
        assert (folder / words[2]).is_file()
        rows = [
            _row(name, keep, "gqa", "exact_match", 0.5) for name, keep in (("dense", None), ("fastv", 64))
        ]
        _write(folder / words[2], rows)
    return words, environment


@needs_lmms
def test_commands_of_the_documentation_run(folder):
    """All in one folder and in their order: some read what earlier ones wrote."""
    (folder / "my.yaml").write_text(RUN_FILE)
    assert {words[0] for words in SHOWN.values()} >= {"vtprune", "lmms-eval", "accelerate"}
    assert len(SHOWN) >= 14
    wrong = []
    for shown, given in SHOWN.items():
        if given[0].startswith("DIR=$("):
            continue
        words, environment = _offline(given, folder)
        done = subprocess.run(
            words,
            check=False,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            wrong.append(f"{shown}\n{' '.join(words)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    assert not wrong, "\n\n".join(wrong)

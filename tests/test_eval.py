"""The evaluation harness and the command line, on tiny random models."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import vtprune
from vtprune.eval import accuracy, evaluation, overlay, results, settings, shrink, speed, world
from vtprune.eval.accuracy import ask, make_batches
from vtprune.eval.cli import main
from vtprune.eval.evaluation import Observer, evaluate
from vtprune.eval.paired import compare
from vtprune.eval.parallel import Source
from vtprune.eval.prompts import EvaluationError, Prompter, load_model
from vtprune.eval.settings import DENSE, Setting, parse_method, plan_settings

KEYS = [
    "model",
    "method",
    "options",
    "keep",
    "task",
    "n",
    "accuracy",
    "stderr",
    "retained",
    "visual_tokens_in",
    "visual_tokens_out",
    "layer_average_tokens",
    "kv_bytes",
    "flops",
    "ttft_ms",
    "decode_ms_per_token",
    "peak_mib",
    "seed",
    "versions",
    "device",
    "command",
    "split",
]
TOKENS = 36  # 96 pixels in patches of 16


def build(tower="clip", attention="sdpa"):
    """A random LLaVA that knows the picture world's words, and its processor."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )

    from vtprune.eval.world import models

    ids = models.vocabulary()
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 16,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape) if tower == "clip" else SiglipVisionConfig(**shape),
        text_config=LlamaConfig(
            vocab_size=len(ids),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=ids[models.PAD],
            bos_token_id=ids[models.BOS],
            eos_token_id=ids[models.EOS],
        ),
        image_token_index=ids[models.IMAGE],
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    model.generation_config.suppress_tokens = [ids[models.IMAGE]]
    processor = LlavaProcessor(
        models.image_processor(),
        models.tokenizer(end=False, padding_side="left"),
        patch_size=16,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
        image_token=models.IMAGE,
        chat_template=models.CHAT_TEMPLATE,
    )
    return model, processor


@pytest.fixture(scope="module")
def tiny():
    return build()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    for part in tiny:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def questions():
    return world.examples("test", 2)


# Arithmetic ----------------------------------------------------------------------------------------------------


def test_mean_and_standard_error_by_hand():
    # squared deviations 3 * 1/16 + 9/16 = 3/4, divided by 4 * 3: 1/16
    assert results.mean_and_stderr([1.0, 1.0, 0.0, 1.0]) == (0.75, 0.25)
    mean, error = results.mean_and_stderr([1 / 3, 2 / 3, 1.0])  # means of several draws
    assert mean == pytest.approx(2 / 3)
    assert error == pytest.approx(math.sqrt((1 / 9 + 0 + 1 / 9) / 6))
    assert results.mean_and_stderr([1.0]) == (1.0, None)
    with pytest.raises(ValueError, match="no answers"):
        results.mean_and_stderr([])


def test_retained_is_relative_to_dense():
    assert results.retained(0.3, 0.6) == 0.5
    assert results.retained(0.9, 0.6) == pytest.approx(1.5)
    assert results.retained(0.0, 0.0) is None


# Settings ------------------------------------------------------------------------------------------------------


def test_default_plan_holds_every_control_and_all_means_all():
    plan = plan_settings(None, None, [144, 144])
    assert plan[0] == Setting(DENSE)
    controls = {"keep-all", "random", "stride", *settings.CONTROLS}
    assert {s.method for s in plan} == {*settings.DEFAULT_METHODS, *controls}
    everything = plan_settings(["all"], None, [144, 144])
    assert {s.method for s in everything} == {*vtprune.list_methods(), *settings.CONTROLS}
    more = plan_settings(["all", "vtc-cls:first_layer=0"], None, [144, 144])
    assert {*more} == {*everything, *plan_settings(["vtc-cls:first_layer=0"], None, [144, 144])}
    assert [s.keep for s in plan if s.method == "stride"] == [48, 32, 16]
    assert all(s.draws == (0, 1, 2) for s in plan if s.method == "random")
    assert [s.keep for s in plan_settings(["stride"], None, [100, 200])] == [None, 0.33, 0.22, 0.11]


def test_options_of_methods():
    assert parse_method("vtc-cls:first_layer=-1,scorer=received") == (
        "vtc-cls",
        {"first_layer": -1, "scorer": "received"},
    )
    assert parse_method("sparsevlm:layers=(2, 4, 5),counts=[16,16,16],recycle=0.1")[1] == {
        "layers": (2, 4, 5),
        "counts": [16, 16, 16],
        "recycle": 0.1,
    }
    (_, one) = plan_settings(["rollout|farthest|merge:beta=0.1"], [4], [36])
    assert one == Setting("rollout|farthest|merge:beta=0.1", 4)
    assert plan_settings(["vtc-cls|outliers"], [4], [36])[1:] == [Setting("vtc-cls|outliers")]
    with pytest.raises(vtprune.InvalidOptionError, match="farthest"):
        parse_method("rollout|fartest")
    plan = plan_settings(["random:seed=5", "stride:keep=7"], [4], [36])
    assert plan[1:] == [Setting("random", 4, (("seed", 5),)), Setting("stride", 7)]
    with pytest.raises(vtprune.UnknownMethodError, match="vtc-cls"):
        parse_method("vtccls")
    with pytest.raises(vtprune.InvalidOptionError, match="option=value"):
        parse_method("stride:keep")
    with pytest.raises(vtprune.InvalidOptionError, match="takes no options"):
        parse_method("dense:keep=3")
    with pytest.raises(vtprune.InvalidOptionError, match="keep=0"):
        plan_settings(["stride"], [0], [36])


def test_downsampling_makes_the_largest_square_within_the_budget(tiny, questions):
    model, processor = tiny
    prompter = Prompter(model, processor)
    inputs = prompter.inputs([e.image for e in questions], [e.question for e in questions])
    small = shrink.shrink(model, inputs, 20)
    assert small["pixel_values"].shape[-2:] == (64, 64)
    assert prompter.tokens(small) == [16] * len(questions)
    assert small["attention_mask"].sum() == inputs["attention_mask"].sum() - 20 * len(questions)
    text = [row[row != prompter.placeholder].tolist() for row in inputs["input_ids"]]
    assert text == [row[row != prompter.placeholder].tolist() for row in small["input_ids"]]
    assert not model.model.vision_tower._forward_pre_hooks


# Answers and costs ---------------------------------------------------------------------------------------------


def test_evaluate_gives_rows_for_every_setting_and_task(tiny, questions):
    plan = plan_settings(["keep-all", "random", "fastv", "downsample"], [9], [TOKENS])
    done = evaluate(*tiny, questions, plan, name="tiny", rounds=1, batch_size=5)
    assert not done.skipped
    assert len(done.rows) == len(plan) * (1 + len(world.KINDS))
    rows = {row.method: row for row in done.rows if row.task == "all"}
    assert rows["dense"].n == len(questions)
    assert rows["random"].options == {"seeds": [0, 1, 2]}
    for method, tokens, average in (
        ("dense", 36, 36.0),
        ("keep-all", 36, 36.0),
        ("random", 9, 9.0),
        ("downsample", 9, 9.0),
        ("fastv", 9, (36 + 36 + 9) / 3),
    ):
        assert (rows[method].visual_tokens_out, rows[method].layer_average_tokens) == (tokens, average)
    assert rows["dense"].flops == rows["keep-all"].flops > rows["fastv"].flops > rows["random"].flops
    assert rows["downsample"].flops < rows["random"].flops  # its encoder is cheaper too
    assert rows["dense"].kv_bytes > rows["fastv"].kv_bytes > rows["random"].kv_bytes > 0
    assert rows["dense"].peak_mib > rows["random"].peak_mib > 0
    assert all(row.ttft_ms > 0 for row in done.rows)
    assert any("same 12 answers" in note for note in done.notes)


def test_answers_do_not_depend_on_the_batch(tiny, questions):
    model, processor = tiny
    prompter = Prompter(model, processor)
    texts = [
        ask(model, prompter, questions, make_batches(prompter, questions, size), [Setting("stride", 9)])[
            0
        ].texts
        for size in (1, 12)
    ]
    assert texts[0] == texts[1]


def test_flops_count_attention_whatever_computes_it(questions):
    counts = []
    for attention in ("sdpa", "eager"):
        model, processor = build(attention=attention)
        inputs = Prompter(model, processor).inputs([questions[0].image], [questions[0].question])
        costs, _ = speed.measure(model, inputs, [Setting(DENSE)], rounds=1)
        counts.append(costs[Setting(DENSE)].flops)
    assert counts[0] == counts[1]


def test_live_memory_sees_what_is_freed():
    given = torch.zeros(1000)
    memory = speed.LiveMemory([given])
    with memory:
        a = given + 1
        b = a.view(10, 100)
        del a, b
        c = given + 2
    assert memory.peak == c.untyped_storage().nbytes() == 4000


class Recorder(Observer):
    def __init__(self):
        self.skipped = {}

    def skip(self, setting, reason):
        self.skipped[setting.method] = reason


def test_unsupported_methods_are_skipped_with_their_reason(questions):
    seen = Recorder()
    done = evaluate(*build("siglip"), questions[:2], [Setting("vtc-cls", 9)], rounds=1, observer=seen)
    assert "no [CLS]" in seen.skipped["vtc-cls"]
    assert {row.method for row in done.rows} == {"dense"}


def test_one_bad_question_costs_one_answer(tiny, questions, monkeypatch):
    model, processor = tiny
    prompter = Prompter(model, processor)
    broken = replace(questions[3], image=Image.new("RGB", (96, 96), "red"))
    asked = [*questions[:3], broken, *questions[4:]]
    bad = prompter.inputs([broken.image], [broken.question])["pixel_values"][0]
    real = accuracy.generate

    def generate(model, inputs, *rest):
        if any(torch.equal(picture, bad) for picture in inputs["pixel_values"]):
            raise RuntimeError("cannot see red\nat all")
        return real(model, inputs, *rest)

    monkeypatch.setattr(accuracy, "generate", generate)
    (outcome,) = ask(model, prompter, asked, make_batches(prompter, asked, 4), [Setting("stride", 9)])
    assert outcome.errors == {3: "RuntimeError: cannot see red"}
    assert outcome.correct[3] == 0


def test_a_setting_that_always_fails_is_skipped(tiny, questions, monkeypatch):
    def generate(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(accuracy, "generate", generate)
    with pytest.raises(EvaluationError, match="unpatched model fails"):
        evaluate(*tiny, questions[:2], [], rounds=1)


def test_unsupported_models_are_refused_at_once(tiny, questions):
    with pytest.raises(vtprune.UnsupportedModelError):
        evaluate(torch.nn.Linear(1, 1), tiny[1], questions, [])


def test_no_image_is_blind(tiny, questions):
    model, processor = tiny
    prompter = Prompter(model, processor)
    blank = prompter.inputs([e.image for e in questions], [e.question for e in questions], blank=True)
    pixels = blank["pixel_values"]
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    assert (pixels == pixels.flatten()[0]).all()


# Pictures ------------------------------------------------------------------------------------------------------


def test_overlay_leaves_kept_patches_and_dims_dropped_ones():
    picture = Image.new("RGB", (40, 20), (250, 250, 250))
    drawn = overlay.overlay(picture, 2, 4, [0, 5], side=160)
    assert drawn.size == (160, 80)
    centre = {i: drawn.getpixel((i % 4 * 40 + 20, i // 4 * 40 + 20)) for i in range(8)}
    assert centre[0] == centre[5] == (250, 250, 250)
    assert all(max(centre[i]) < 130 for i in range(8) if i not in (0, 5))
    assert drawn.getpixel((0, 20)) == overlay.OUTLINE


def test_seen_undoes_the_processor(tiny, questions):
    model, processor = tiny
    prompter = Prompter(model, processor)
    image = questions[0].image
    assert prompter.seen(prompter.inputs([image], ["?"]), image).tobytes() == image.tobytes()
    wide = Image.new("RGB", (300, 96), "blue")
    wide.paste("red", (102, 0, 198, 96))
    assert prompter.fit(wide).getcolors() == [(96 * 96, (255, 0, 0))]


# Command line --------------------------------------------------------------------------------------------------


def run(*arguments):
    return main([str(a) for a in arguments])


def test_eval_writes_rows_predictions_and_a_self_contained_report(folder, tmp_path, capsys):
    output = tmp_path / "out"
    command = ("eval", "--model", folder, "--limit", 2, "--keep", 9, "--keep", 0.5, "--output", output)
    methods = ("keep-all", "vtc-cls", "no-image", "downsample")
    command += tuple(x for method in methods for x in ("--method", method))
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "12 on test, 6 on unseen_style" in printed
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 7 * (1 + len(world.KINDS))
    assert all(list(row) == KEYS for row in rows)
    assert {row["split"] for row in rows} == {"test", "unseen_style"}
    assert {row["keep"] for row in rows} == {None, 9, 0.5}
    assert {row["n"] for row in rows if row["task"] == "all"} == {12, 6}
    assert set(rows[0]["versions"]) == {
        "python", "torch", "transformers", "vtprune", "vtprune_commit", "vtprune_dirty",
    }  # fmt: skip
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 7 * (12 + 6)
    page = (output / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count('<img src="data:image/') >= 12 * 2
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", page))
    assert not re.search(r"https?:|<script|<link|url\((?!#)|@import", page)


def test_eval_never_overwrites_unless_told_to(tmp_path):
    wanted = tmp_path / "out"
    assert results.output_folder(wanted, overwrite=False) == wanted
    (wanted / "results.jsonl").write_text("precious")
    (wanted / "notes.txt").write_text("mine")
    assert results.output_folder(wanted, overwrite=False) == tmp_path / "out-2"
    assert results.output_folder(wanted, overwrite=False) == tmp_path / "out-2"  # still empty
    assert (wanted / "results.jsonl").read_text() == "precious"
    assert results.output_folder(wanted, overwrite=True) == wanted
    assert [f.name for f in wanted.iterdir()] == ["notes.txt"]


def test_interrupting_keeps_what_is_done(folder, tmp_path, monkeypatch):
    real = evaluation.ask

    def ask(model, prompter, examples, batches, settings, *rest):
        if settings[0].method == "stride":
            raise KeyboardInterrupt
        return real(model, prompter, examples, batches, settings, *rest)

    monkeypatch.setattr(evaluation, "ask", ask)
    monkeypatch.setattr(evaluation, "TOGETHER", 1)
    output = tmp_path / "out"
    assert run("eval", "--model", folder, "--limit", 1, "--method", "stride", "--output", output) == 130
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"dense"}
    assert (output / "report.html").exists()


def test_remembering_changes_nothing_but_the_work(tiny, questions):
    model, processor = tiny
    prompter = Prompter(model, processor)
    batches = make_batches(prompter, questions, 5)
    together = [
        Setting(DENSE), Setting("no-image"), Setting("tome", 9), Setting("vtc-cls", 9), Setting("downsample", 9),
        Setting("random", 9, (), (0, 1)),
    ]  # fmt: skip
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    alone = [accuracy.ask(model, prompter, questions, batches, [setting])[0] for setting in together]
    layer = next(m for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.Linear))
    worked, real = [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight is layer.weight:
            worked.append(1)
        return real(x, weight, bias)

    torch.nn.functional.linear = linear
    try:
        shared = accuracy.ask(model, prompter, questions, batches, together)
    finally:
        torch.nn.functional.linear = real
        handle.remove()
    assert shared == alone
    # dense, no-image and downsample have pixels of their own; the other four runs see what dense saw.
    assert len(worked) == 3 * len(batches)
    assert len(calls) == 2 * 7 * len(batches)
    assert not any("forward" in vars(module) for module in model.modules())


def test_workers_answer_as_one_process_does(folder, questions):
    model, processor = load_model(str(folder), "cpu", "auto")
    chosen = [Setting("stride", 4), Setting("random", 4, (), (0, 1))]
    one = evaluate(model, processor, questions, chosen, rounds=1)
    two = evaluate(
        model, processor, questions, chosen, rounds=1, jobs=2, source=Source(str(folder), "cpu", "auto")
    )
    assert list(one.outcomes) == list(two.outcomes)
    for key, outcome in one.outcomes.items():
        assert outcome == two.outcomes[key]


def test_workers_need_a_source(tiny, questions):
    with pytest.raises(EvaluationError, match="source"):
        evaluate(*tiny, questions, [], jobs=2)


def test_an_interrupted_evaluation_is_taken_up(folder, tmp_path, monkeypatch, capsys):
    output, whole = tmp_path / "out", tmp_path / "whole"
    common = [
        "eval",
        "--model",
        folder,
        "--limit",
        1,
        "--keep",
        4,
        "--method",
        "vtc-cls",
        "--method",
        "stride",
    ]
    common += ["--split", "test"]
    assert run(*common, "--output", whole) == 0
    real = evaluation.ask

    def ask(model, prompter, examples, batches, settings, *rest):
        if settings[0].method == "stride":
            raise KeyboardInterrupt
        return real(model, prompter, examples, batches, settings, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "ask", ask)
        patched.setattr(evaluation, "TOGETHER", 1)
        assert run(*common, "--output", output) == 130
    with (output / "predictions.jsonl").open("a") as file:
        file.write('{"split": "te')  # cut off in the middle of a line
    asked = []

    def count(model, prompter, examples, batches, settings, *rest):
        asked.extend(setting.method for setting in settings)
        return real(model, prompter, examples, batches, settings, *rest)

    monkeypatch.setattr(evaluation, "ask", count)
    assert run(*common, "--output", output, "--resume") == 0
    assert set(asked) == {"stride"}
    assert "resumed" in capsys.readouterr().out
    assert (output / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    accuracies = [
        [row["accuracy"] for row in map(json.loads, (path / "results.jsonl").read_text().splitlines())]
        for path in (output, whole)
    ]
    assert accuracies[0] == accuracies[1]


def test_other_questions_or_models_are_not_taken_up(folder, tmp_path, capsys):
    output = tmp_path / "out"
    common = [
        "eval",
        "--model",
        folder,
        "--keep",
        4,
        "--method",
        "stride",
        "--split",
        "test",
        "--output",
        output,
    ]
    assert run(*common, "--limit", 1, "--resume") == 2
    assert "leave --resume out" in capsys.readouterr().err
    assert run(*common, "--limit", 2) == 0
    before = (output / "results.jsonl").read_text()
    assert run(*common, "--limit", 1, "--resume") == 2
    assert run(*common, "--limit", 2, "--seed", 1, "--resume") == 2
    assert "start a new one" in capsys.readouterr().err
    assert (output / "results.jsonl").read_text() == before


def test_comparison_by_hand(tiny, questions):
    result = evaluate(*tiny, questions, [Setting("stride", 4), Setting("vtc-cls", 4)], rounds=1)
    split = questions[0].split
    a, b = (result.outcomes[split, Setting(m, 4)].correct for m in ("stride", "vtc-cls"))
    (whole,) = [c for c in compare(result, "stride") if c.task == "all"]
    assert (whole.other, whole.keep) == ("vtc-cls", 4)
    assert whole.result.difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    with pytest.raises(EvaluationError, match="stride"):
        compare(result, "strid")


def test_show_draws_a_png(folder, tmp_path, questions, capsys):
    picture = tmp_path / "picture.jpg"
    questions[0].image.resize((200, 160)).save(picture)
    output = tmp_path / "kept.png"
    command = ("show", picture, "what is it?", "--model", folder, "--method", "vtc-cls", "--keep", 9)
    assert run(*command, "--output", output) == 0
    with Image.open(output) as drawn:
        assert drawn.format == "PNG"
        assert drawn.size == overlay.comparison_size(questions[0].image, "what is it?")
    assert "36 visual tokens -> 9 into the language model" in capsys.readouterr().out


def test_lists(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in vtprune.list_methods())
    assert run("models") == 0
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    assert "vtprune eval" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--method", "vtccls"), "Did you mean 'vtc-cls'"),
        (("eval", "--limit", 0), "at least 1"),
        (("eval", "--model", "FOLDER", "--threads", 0), "give 1 or more"),
        (("eval", "--model", "FOLDER", "--keep", 0), "smallest budget is keep=1"),
        (("eval", "--model", "FOLDER", "--seed", 5000), "seed must be between 0 and 1000"),
        (("eval", "--model", "no/such/folder"), "cannot load"),
        (("show", "nothing.png", "what?"), "there is no file 'nothing.png'"),
        (("show", __file__, "what?"), "cannot be read as a picture"),
        (("show", "PICTURE", "what?", "--model", "FOLDER", "--method", "dense"), "prunes nothing"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments, message, folder, tmp_path, questions, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    questions[0].image.save(tmp_path / "picture.png")
    places = {"FOLDER": folder, "PICTURE": "picture.png"}
    assert run(*(places.get(a, a) for a in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_wrong_devices_are_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EvaluationError, match="sees no CUDA device"):
        load_model(str(folder), "cuda", "auto")

"""The real lmms-eval, by its own command and by `vtprune eval`, gives the answers of `vtprune eval` without it."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
from lmms.common import LIMIT, REFERENCE, conversation_of, losses_of, needs_lmms

import vtprune
from vtprune.eval import world
from vtprune.eval.cli import main
from vtprune.eval.lmms import export, published, runs, tally

# Where Hugging Face's caches are is read when lmms-eval is imported.
pytestmark = [needs_lmms, pytest.mark.usefixtures("folder")]


def test_every_task_of_run_files_and_figures_is_one_of_lmms_eval():
    from vtprune.eval.lmms.tasks import manager

    known = set(manager().all_tasks)
    named = {task for name in runs.shipped() for task in runs.read(name).tasks}
    assert named
    assert named <= known
    assert {benchmark.task for benchmark in published.BENCHMARKS.values()} <= known


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
                losses_of(reference, [conversation_of([e.image], e.question)], [f" {choice}"])[0][0]
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

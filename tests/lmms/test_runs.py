"""Run files, and the options of `vtprune eval` for tasks of lmms-eval."""

from pathlib import Path

import pytest

from vtprune.errors import VTPruneError
from vtprune.eval import cli
from vtprune.eval.cli import main
from vtprune.eval.lmms import arguments, published, runs
from vtprune.eval.lmms import command as lmms_command

# ------------------------------------------------------------------------------------ run files


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


def test_the_package_ships_what_it_reads():
    assert Path(published.FILE).is_file()
    assert set(runs.shipped()) == {"llava-1.5-7b", "llava-1.5-7b-quick", "llava-onevision-7b"}


# ------------------------------------------------------------------------------------ options


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

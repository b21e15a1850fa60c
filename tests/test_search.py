"""The search of options: objective, budget, resumption, and the file it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from typing import ClassVar

import optuna
import pytest
import torch
from test_eval import TOKENS, build

import vtprune
from vtprune.eval import search as searching
from vtprune.eval import world
from vtprune.eval.cli import main
from vtprune.eval.prompts import EvaluationError, Prompter
from vtprune.eval.search import Objective, check_spaces, parse_space, search
from vtprune.eval.settings import Setting, parse_method, plan_settings
from vtprune.methods import FastV, VisionZip, VTCCls, files
from vtprune.space import Choice, Range
from vtprune.testing import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

ZIP = {"contextual": Range(0.0, 0.6)}


@pytest.fixture(scope="module")
def tiny():
    return build()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    for part in tiny:
        part.save_pretrained(path)
    return path


def run(tiny, methods=None, keep=8, spaces=ZIP, **options):
    methods = methods or [VisionZip(keep=keep)]
    return search(*tiny, methods, keep, spaces, **{"samples": 3, "trials": 4, **options})


# Objective -----------------------------------------------------------------------------------------------------


def test_the_objective_is_the_mean_cosine_of_the_last_states(tiny):
    """Against one sample at a time, read at the final norm."""
    model, processor = tiny
    samples = searching.validation_questions(4)
    prompter = Prompter(model, processor)
    trial = Objective(model, prompter, samples, 8, batch_size=3)([VTCCls(keep=8)], {})

    def state(inputs):
        seen = []
        handle = model.model.language_model.norm.register_forward_hook(lambda m, a, out: seen.append(out))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        return seen[0][0, -1].double()

    cosines = []
    for sample in samples:
        inputs = prompter.inputs([sample.image], [sample.question])
        dense = state(inputs)
        with vtprune.patch(model, "vtc-cls", keep=8):
            pruned = state(inputs)
        cosines.append(float(dense @ pruned / dense.norm() / pruned.norm()))
    assert trial.objective == pytest.approx(sum(cosines) / 4, abs=1e-6)
    assert trial.objective < 1
    assert (trial.layer_average, trial.excess) == (8, 0)
    everything = Objective(model, prompter, samples, 8)([vtprune.methods.KeepAll()], {})
    assert everything.objective == pytest.approx(1, abs=1e-6)
    assert not everything.accepted  # 36 tokens instead of 8


def test_validation_questions_only(tiny):
    assert {e.split for e in searching.validation_questions(7)} == {"val"}
    assert len(searching.validation_questions(7)) == 7
    with pytest.raises(EvaluationError, match="must not be searched on the questions"):
        run(tiny, samples=world.examples("test", 1))
    with pytest.raises(EvaluationError, match="at least one sample"):
        run(tiny, samples=0)
    with pytest.raises(EvaluationError, match="at least one trial"):
        run(tiny, trials=0)


# Search --------------------------------------------------------------------------------------------------------


def test_the_best_trial_wins_and_nothing_is_left_behind(tiny):
    before = {k: v.clone() for k, v in tiny[0].state_dict().items()}
    level = optuna.logging.get_verbosity()
    seen = []
    result = run(tiny, on_trial=lambda number, trial, best: seen.append((number, trial, best)))
    assert [n for n, _, _ in seen] == [1, 2, 3, 4]
    assert tuple(t for _, t, _ in seen) == result.trials
    assert result.best.objective == max(t.objective for t in result.trials)
    assert seen[-1][2] == result.best
    assert result.trials[0].values == {"contextual": 10 / 64}  # the defaults come first
    assert result.trials[0].objective == result.baseline.objective <= result.best.objective
    assert result.methods == (VisionZip(keep=8, contextual=result.best.values["contextual"]),)
    assert all(t.values["contextual"] in ZIP["contextual"] for t in result.trials)
    vtprune.patch(tiny[0], "keep-all").remove()  # no patch is left
    assert all(torch.equal(v, before[k]) for k, v in tiny[0].state_dict().items())
    assert optuna.logging.get_verbosity() == level


def test_the_seed_decides(tiny):
    first = run(tiny, trials=13)  # beyond the 10 random trials with which the sampler starts
    assert run(tiny, trials=13).trials == first.trials
    assert len({t.values["contextual"] for t in first.trials}) == 13
    other = run(tiny, samples=searching.validation_questions(3), seed=1, trials=2)
    assert other.trials[0].values == first.trials[0].values
    assert other.trials[1].values != first.trials[1].values


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    whole = run(tiny, trials=14)
    storage = tmp_path / "trials.sqlite"

    def interrupt(number, trial, best):
        if number in (1, 12):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tiny, trials=14, storage=storage, on_trial=interrupt)
        # What kill leaves in the middle of a trial: one that seems to run.
        optuna.load_study(study_name=searching.STUDY, storage=f"sqlite:///{storage}").ask()
    counted = []
    result = run(
        tiny, trials=14, storage=storage, on_trial=lambda number, trial, best: counted.append(number)
    )
    assert counted == [13, 14]
    assert result.trials == whole.trials
    assert result.methods == whole.methods
    again = run(tiny, trials=14, storage=storage, on_trial=lambda *a: pytest.fail("there is nothing to do"))
    assert again.trials == whole.trials
    states = [
        t.state.name
        for t in optuna.load_study(study_name=searching.STUDY, storage=f"sqlite:///{storage}").trials
    ]
    assert sorted(states) == ["COMPLETE"] * 14 + ["FAIL"] * 2
    with pytest.raises(EvaluationError, match=r"keep was 8, now 9"):
        run(tiny, keep=9, storage=storage)
    with pytest.raises(EvaluationError, match="samples was 3, now 2"):
        run(tiny, samples=2, storage=storage)
    torn = tmp_path / "other.sqlite"
    torn.write_text("this is no database, but it is long enough to be taken for one " * 20)
    with pytest.raises(EvaluationError, match="no file of an earlier search"):
        run(tiny, storage=torn)


def test_an_interrupted_trial_is_not_counted(tiny, tmp_path, monkeypatch):
    whole, storage = run(tiny, trials=2), tmp_path / "trials.sqlite"
    stock = Objective.__call__

    def fails_late(self, methods, values):
        if len(values) and values != {"contextual": 10 / 64}:
            raise KeyboardInterrupt
        return stock(self, methods, values)

    monkeypatch.setattr(Objective, "__call__", fails_late)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, trials=2, storage=storage)
    monkeypatch.undo()
    assert run(tiny, trials=2, storage=storage).trials == whole.trials


def test_trials_over_the_budget_do_not_count(tiny):
    """3 layers, 36 tokens, 4 kept: the average is (36 l + 4 (3 - l)) / 3 for layer l."""
    result = run(tiny, [FastV(keep=4, layer=1)], 15, {"layer": Range(1, 2)}, trials=9)
    averages = {t.values["layer"]: t.layer_average for t in result.trials}
    assert averages == {1: pytest.approx(44 / 3), 2: pytest.approx(76 / 3)}
    assert result.best.values == {"layer": 1}  # although layer 2 changes less
    late = next(t for t in result.trials if t.values == {"layer": 2})
    assert late.objective > result.best.objective
    assert not late.accepted
    assert late.worth < -1 <= min(t.worth for t in result.trials if t.accepted)
    assert any("over the budget and do not count" in note for note in result.notes)
    # 44 / 3 is 1 % above 14.52..., so 14.53 is kept and 14 is not
    with pytest.raises(EvaluationError, match=r"leanest left 14\.7 visual tokens per sample, 5 % too many"):
        run(tiny, [FastV(keep=4, layer=1)], 14, {"layer": Range(1, 2)}, trials=2)
    share = 14.53 / TOKENS
    trial = Objective(tiny[0], Prompter(*tiny), searching.validation_questions(1), share)
    assert trial([FastV(keep=4, layer=1)], {}).excess == pytest.approx(44 / 3 / 15 - 1)  # rounds to 15


def test_options_that_the_model_refuses_are_told(tiny):
    result = run(tiny, [VTCCls(keep=8, first_layer=1)], spaces={"first_layer": Range(0, 9)}, trials=6)
    refused = [t for t in result.trials if t.objective is None]
    assert {t.values["first_layer"] for t in refused} <= set(range(2, 10))
    assert refused
    assert all(t.worth == searching.INVALID and "outside the model" in t.reason for t in refused)
    assert any("did not run; the first said" in note for note in result.notes)
    with pytest.raises(EvaluationError, match=r"do not run on this model.*outside the model"):
        run(tiny, [VTCCls(keep=8, first_layer=7)], spaces={"first_layer": Range(0, 9)})
    with pytest.raises(EvaluationError, match="none of 2 trials could run"):
        run(tiny, [VTCCls(keep=8)], spaces={"first_layer": Range(3, 9)}, trials=2)


def test_a_composition_has_numbered_options(tiny, tmp_path):
    methods = [VTCCls(keep=16), FastV(keep=4, layer=1)]
    spaces = {"0.first_layer": Range(0, 1), "1.layer": Range(1, 2)}
    result = run(tiny, methods, 13, spaces, trials=5)
    assert result.methods == tuple(
        dataclasses.replace(m, **{o: result.best.values[n]})
        for m, o, n in zip(methods, ("first_layer", "layer"), spaces, strict=True)
    )
    result.write(tmp_path / "both.json")
    with vtprune.patch(tiny[0], tmp_path / "both.json") as patch:
        assert patch.method == vtprune.compose(*result.methods)
    for name in ("layer", "2.layer", "x.layer"):
        with pytest.raises(vtprune.InvalidOptionError, match=r"0\. for vtc-cls, 1\. for fastv"):
            check_spaces(methods, {name: Range(1, 2)})


def test_gaussian_process_or_how_to_get_it(tiny):
    if importlib.util.find_spec("scipy") is None:
        with pytest.raises(EvaluationError, match="pip install scipy"):
            run(tiny, sampler="gp")
    else:
        assert len(run(tiny, sampler="gp", trials=12).trials) == 12
    with pytest.raises(vtprune.InvalidOptionError, match="there is no sampler 'gpp'"):
        run(tiny, sampler="gpp")


def test_without_optuna(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EvaluationError, match=r"pip install 'vtprune\[search\]'"):
        run(tiny)
    assert main(["search", "--method", "visionzip", "--keep", "8", "--range", "contextual=0:1"]) == 2
    assert "pip install 'vtprune[search]'" in capsys.readouterr().err


# Spaces --------------------------------------------------------------------------------------------------------


def test_spaces_take_the_types_of_the_options():
    assert check_spaces([VisionZip(keep=8)], {"contextual": Range(0, 1)}) == {"contextual": Range(0.0, 1.0)}
    assert check_spaces([FastV()], {"layer": Range(1, 7)})["layer"].whole
    assert not check_spaces([FastV()], {"layer": Range(0.1, 0.9)})["layer"].whole
    assert check_spaces([FastV()], {"layer": Choice((1, 0.5))}) == {"layer": Choice((1, 0.5))}
    assert check_spaces([VTCCls(keep=8)], {"scorer": Choice(("cls", "received"))})
    assert 0.5 in Range(0.0, 1.0)
    assert 1 not in Range(0.0, 1.0)  # a layer given as 1 is another one than 1.0
    assert True not in Choice((1, 2))


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({"keep": Range(1, 9)}, "is the budget"),
        ({"positions": Choice(("original", "dense"))}, "is not searched"),
        ({"laier": Range(1, 9)}, "Did you mean 'layer'"),
        ({"layer": Choice(("early", "late"))}, "does not take 'early'"),
        ({}, "nothing to search: fastv declares no ranges. Give some .* for: layer"),
    ],
)
def test_spaces_that_an_option_does_not_take(space, reason):
    with pytest.raises(vtprune.InvalidOptionError, match=reason):
        check_spaces([FastV()], space)


def test_spaces_that_are_none():
    with pytest.raises(vtprune.InvalidOptionError, match="give a choice such as scorer=cls,received"):
        check_spaces([VTCCls(keep=8)], {"scorer": Range(0, 1)})
    with pytest.raises(vtprune.InvalidOptionError, match=r"does not take 'clss'. Did you mean 'cls'"):
        check_spaces([VTCCls(keep=8)], {"scorer": Choice(("clss", "received"))})
    with pytest.raises(vtprune.InvalidOptionError, match="at least one method"):
        check_spaces([], {})
    with pytest.raises(vtprune.InvalidOptionError, match="no numbers or choices"):
        check_spaces([vtprune.methods.KeepAll()], {})
    for bounds in ((2, 1), (1, 1), (0.0, float("inf")), (0.0, float("nan"))):
        with pytest.raises(vtprune.InvalidOptionError, match="lower and a higher finite bound"):
            Range(*bounds)
    with pytest.raises(vtprune.InvalidOptionError, match="bounds above 0"):
        Range(0, 1, log=True)
    for values in ((), (1,), (1, 1)):
        with pytest.raises(vtprune.InvalidOptionError, match="no choice"):
            Choice(values)


def test_spaces_as_text():
    assert parse_space("t=0:50", "range") == ("t", Range(0, 50))
    assert parse_space("0.t=0.1:50.0:log", "range") == ("0.t", Range(0.1, 50.0, log=True))
    assert parse_space("t=-1:1.0", "range") == ("t", Range(-1, 1.0))
    assert parse_space("s=cls,2,0.5,true", "choice") == ("s", Choice(("cls", 2, 0.5, True)))
    for text in ("t", "=0:1", "t=", "t=1", "t=a:b", "t=0:1:ln", "t=0:1:log:2"):
        with pytest.raises(vtprune.InvalidOptionError, match="is no range"):
            parse_space(text, "range")
    with pytest.raises(vtprune.InvalidOptionError, match="is no choice"):
        parse_space("cls", "choice")


# Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "found.json"
    chosen = VTCCls(keep=4, first_layer=0.25)
    files.dump(path, [chosen], 4, {"class": "LlavaForConditionalGeneration"}, objective=0.5)
    return path


def test_a_file_stands_for_its_method(file):
    model, inputs = tiny_llava(), llava_inputs([[1, "image", 11]])
    kept = []
    for method in (str(file), file, VTCCls(keep=4, first_layer=0.25)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with vtprune.patch(model, method) as patch, torch.no_grad():
                model(**inputs)
                kept.append(patch.report().images[0].kept["encoder"].tolist())
                assert patch.report().notes == []
                assert patch.method == VTCCls(keep=4, first_layer=0.25)
    assert kept[0] == kept[1] == kept[2]
    with pytest.raises(vtprune.InvalidOptionError, match="carries its own"):
        vtprune.patch(model, file, keep=3)


def test_a_file_of_another_model_class_is_used_with_a_note(tmp_path):
    path = tmp_path / "found.json"
    files.dump(path, [FastV(keep=2)], 2, {"class": "LlavaForConditionalGeneration"})
    model = tiny_qwen2_5_vl()
    with pytest.warns(UserWarning, match="searched on a LlavaForConditionalGeneration; this is a Qwen2_5_VL"):
        patch = vtprune.patch(model, path)
    with patch, torch.no_grad():
        model(**qwen_inputs([[10, (2, 2), 11]]))
        (note,) = patch.report().notes
        assert "others may be better" in note
        assert note in str(patch.report())


def test_files_that_cannot_be_read(file, tmp_path):
    good = json.loads(file.read_text())

    def refused(reason, text=None, **changes):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({**good, **changes}) if text is None else text)
        for read in (files.load, lambda p: vtprune.patch(tiny_llava(), p), lambda p: parse_method(str(p))):
            with pytest.raises(vtprune.InvalidOptionError, match=reason):
                read(path)

    refused("version 2; this vtprune reads version 1", version=2)
    refused("no method file of vtprune", format="other")
    refused("no method file of vtprune", "[]")
    refused("damaged: no JSON at line 2, column 1", "{\n")
    refused("there is no method 'vtc-clss'", methods=[{"method": "vtc-clss", "options": {}}])
    refused("has no option 'first'", methods=[{"method": "vtc-cls", "options": {"keep": 1, "first": 2}}])
    refused("damaged: KeyError 'options'", methods=[{"method": "vtc-cls"}])
    refused("it holds no method", methods=[])
    refused("keep=0 would leave no visual token", keep=0)
    refused("damaged: KeyError 'class'", model={})
    with pytest.raises(vtprune.InvalidOptionError, match="No such file"):
        vtprune.patch(tiny_llava(), tmp_path / "none.json")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(VTCCls):
        key: ClassVar[str] = "mine"

    with pytest.raises(vtprune.InvalidOptionError, match="Mine is not registered"):
        files.dump(tmp_path / "mine.json", [Mine(keep=3)], 3, {"class": "x"})
    assert not (tmp_path / "mine.json").exists()


def test_an_evaluation_takes_a_file(tiny, file):
    (_, setting) = plan_settings([str(file)], [16, 8], [TOKENS])
    assert setting == Setting(str(file), 4)  # its own budget, whatever is asked of the others
    with setting.applied(build()[0]) as patch:
        assert patch.method == VTCCls(keep=4, first_layer=0.25)


# Command line --------------------------------------------------------------------------------------------------


def call(folder, output, *more, method="visionzip", keep="8"):
    return main(
        [
            *("search", "--model", str(folder), "--method", method, "--keep", keep, "--output", str(output)),
            *("--samples", "2", "--trials", "3", *more),
        ]
    )


def test_command(folder, tmp_path, capsys):
    output = tmp_path / "runs" / "found.json"
    assert call(folder, output, "--range", "contextual=0:0.5") == 0
    printed = capsys.readouterr().out
    assert "searching contextual in 0.0:0.5" in printed
    assert "left as they are, for want of a range: scorer=cls" in printed
    assert "3 trials on 2 samples" in printed
    record = json.loads(output.read_text())
    assert record["methods"][0]["method"] == "visionzip"
    assert record["keep"] == 8
    assert record["trials"] == record["accepted"] == 3
    assert record["objective"] >= record["baseline"]["objective"]
    assert record["model"]["class"] == "LlavaForConditionalGeneration"
    assert record["versions"]["optuna"] == optuna.__version__
    assert call(folder, output, "--range", "contextual=0:0.5") == 0  # finished: nothing is tried again
    assert json.loads(output.read_text()) == record
    capsys.readouterr()
    assert call(folder, output, "--range", "contextual=0:0.4") == 2
    assert "holds trials of another search" in capsys.readouterr().err
    assert call(folder, output, "--range", "contextual=0:0.4", "--overwrite") == 0
    assert json.loads(output.read_text())["spaces"] == {"contextual": "0.0:0.4"}


def test_declared_spaces_are_searched_unless_fixed(monkeypatch):
    monkeypatch.setattr(VTCCls, "search_space", {"first_layer": Range(0.0, 0.9)})
    methods = [VTCCls(keep=8), FastV()]
    assert searching.declared_spaces(methods) == {"0.first_layer": Range(0.0, 0.9)}
    assert searching.declared_spaces(methods, [["first_layer"], []]) == {}
    assert searching.declared_spaces(methods[:1]) == {"first_layer": Range(0.0, 0.9)}
    assert searching.left_alone(methods, searching.declared_spaces(methods)) == {
        "0.scorer": "cls",
        "1.layer": 2,
    }


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--range", "contextual=0:1", "--choice", "contextual=0.1,0.2"], "two ranges or choices"),
        (["--range", "contextual=1"], "is no range"),
        (["--range", "contextual=0:1", "--method", "no-image"], "no options to search"),
    ],
)
def test_command_refuses(more, reason, tmp_path, capsys):
    assert call("no-such-model", tmp_path / "found.json", *more) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_when_all_options_are_fixed(tmp_path, capsys):
    assert call("no-such-model", tmp_path / "found.json", method="visionzip:contextual=0.1") == 2
    assert "nothing to search" in capsys.readouterr().err


def test_command_keeps_other_files(tmp_path, capsys):
    other = tmp_path / "mine.json"
    other.write_text("precious")
    assert call("no-such-model", other, "--range", "contextual=0:1") == 2
    assert other.read_text() == "precious"
    assert call("no-such-model", tmp_path / "found.txt", "--range", "contextual=0:1") == 2
    assert "must end in .json" in capsys.readouterr().err

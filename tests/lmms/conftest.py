"""Fixtures of the tests of lmms-eval."""

import os

import pytest
from lmms.common import LIMIT, REFERENCE

from vtprune.eval import world
from vtprune.eval.accuracy import ask, make_batches
from vtprune.eval.lmms import export
from vtprune.eval.prompts import Prompter, load_model
from vtprune.eval.settings import Setting


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

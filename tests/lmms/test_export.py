"""Exported tasks hold exactly the questions of `vtprune eval`."""

import io

import numpy as np
import pytest
from PIL import Image

from vtprune.eval import world
from vtprune.eval.lmms import export
from vtprune.eval.prompts import EvaluationError


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

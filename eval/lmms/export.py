"""The picture world as tasks of lmms-eval: parquet files, one YAML file per question kind, and a group of them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..accuracy import NEW_TOKENS
from ..prompts import EvaluationError
from ..world import KINDS, Example, examples

PREFIX = "vtprune"
FIELDS = ("scene_seed", "split", "kind", "question", "answer")
UTILS = '''\
"""What the tasks of this folder are made of; written by `vtprune export-tasks`."""

from vtprune.eval.world import score


def picture(doc):
    """What is shown."""
    return [doc["image"].convert("RGB")]


def correct(doc, results):
    """1.0 for a right answer, else 0.0: the rule of `vtprune eval`."""
    return {"accuracy": float(score(results[0], doc["answer"]))}
'''
TASK = """\
# {count} questions of kind {kind!r}, split {split!r}, seed {seed}; written by `vtprune export-tasks`.
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    {split}: {file}
test_split: {split}
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: question
doc_to_target: answer
process_results: !function utils.correct
generation_kwargs:
  until: []
  max_new_tokens: {new_tokens}
  do_sample: false
  num_beams: 1
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
GROUP = """\
# All question kinds of the picture world, split {split!r}; written by `vtprune export-tasks`.
group: {name}
task:
{tasks}
aggregate_metric_list:
  - metric: accuracy
    aggregation: mean
    weight_by_size: true
metadata:
  version: 1.0
"""


def task_name(kind: str, split: str) -> str:
    """Name of the task of a question kind; the main split has none in it."""
    return f"{group_name(split)}_{kind.replace('-', '_').replace(' ', '_')}"


def group_name(split: str) -> str:
    """Name of the group of all kinds."""
    return f"{PREFIX}_pictures" + ("" if split == "test" else f"_{split}")


def export_tasks(folder: Path, splits: Sequence[str], limit: int, seed: int = 0) -> list[str]:
    """Writes the questions that `vtprune eval` asks with the same split, limit and seed.

    Args:
        folder: for the files; made if needed. Earlier exports in it are replaced.
        splits: parts of the picture world.
        limit: questions per kind.
        seed: which held-out scenes.

    Returns:
        Names of the groups.

    Raises:
        EvaluationError: pyarrow is not installed, or the world has no such questions.
    """
    write = _parquet_writer()
    groups = []
    for split in dict.fromkeys(splits):
        try:
            asked = examples(split, limit, seed)
        except ValueError as error:
            raise EvaluationError(f"{error}. Change the split, seed or limit.") from error
        if not asked:
            raise EvaluationError("there are no questions to export; raise the limit.")
        (folder / "data").mkdir(parents=True, exist_ok=True)
        names = []
        for kind in KINDS:
            chosen = [example for example in asked if example.kind == kind]
            name = task_name(kind, split)
            file = f"data/{name}.parquet"
            write(folder / file, chosen)
            (folder / f"{name}.yaml").write_text(
                TASK.format(
                    count=len(chosen),
                    kind=kind,
                    split=split,
                    seed=seed,
                    name=name,
                    file=file,
                    new_tokens=NEW_TOKENS,
                ),
                encoding="utf-8",
            )
            names.append(name)
        group = group_name(split)
        lines = "\n".join(f"  - {name}" for name in names)
        (folder / f"{group}.yaml").write_text(
            GROUP.format(split=split, name=group, tasks=lines), encoding="utf-8"
        )
        groups.append(group)
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    return groups


def _parquet_writer() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise EvaluationError(
            "writing tasks needs pyarrow, which comes with lmms-eval: pip install 'vtprune[lmms]'"
        ) from error
    # The annotation by which `datasets` knows a column of pictures.
    text, number = ({"dtype": kind, "_type": "Value"} for kind in ("string", "int64"))
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features |= {name: number if name == "scene_seed" else text for name in FIELDS}
    annotation = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = [("image", image)]
    columns += [(name, pyarrow.int64() if name == "scene_seed" else pyarrow.string()) for name in FIELDS]
    schema = pyarrow.schema(columns, metadata=annotation)

    def write(path: Path, asked: Sequence[Example]) -> None:
        data: dict[str, list[Any]] = {name: [getattr(e, name) for e in asked] for name in FIELDS}
        data["image"] = [{"bytes": _png(e.image), "path": None} for e in asked]
        parquet.write_table(pyarrow.table(data, schema=schema), path)

    return write


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()

"""What every method owes: its file is short, its docstring complete, and a test transcribes its formula."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from pathlib import Path

import pytest

import vtprune
from vtprune.methods import method_class
from vtprune.space import fitted

CONTROLS = ("keep-all", "random", "stride")
LONGEST = 80
HERE = Path(__file__).parent
PROMISED = """vtc-cls vflowopt atp-llava mstm as-vit spatten rollout act random-ltd submodular ucofia stella fastv sparsevlm
visionzip prumerge prumerge-plus pyramiddrop divprune cdpruner dart fastervlm vispruner holov flowcut tome vtprune
evs dycoke fastvid llava-scissor"""


def code_lines(path: Path) -> int:
    """Lines with code: no docstrings, comments or blank lines."""
    source = path.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    blank = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def test_every_promised_method_is_there() -> None:
    assert set(PROMISED.split()) <= set(vtprune.list_methods())


def test_one_file_each() -> None:
    files = [inspect.getfile(method_class(key)) for key in vtprune.list_methods()]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("key", vtprune.list_methods())
def test_files_are_short_and_say_where_they_come_from(key: str) -> None:
    cls = method_class(key)
    path = Path(inspect.getfile(cls))
    assert code_lines(path) <= LONGEST
    doc = cls.__doc__ or ""
    assert key in CONTROLS or "Source:" in doc
    name = "own" if key == "vtprune" else path.stem
    tests = "controls" if key in CONTROLS else name
    assert (HERE / f"test_{tests}.py").exists()


@pytest.mark.parametrize("key", vtprune.list_methods())
def test_declared_ranges_are_ranges_of_options(key: str) -> None:
    cls = method_class(key)
    for option, space in cls.search_space.items():
        assert fitted(cls, option, space) == space
        default = next(f.default for f in dataclasses.fields(cls) if f.name == option)
        assert default is None or default in space

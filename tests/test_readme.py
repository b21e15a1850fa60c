"""The Python blocks of README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import vtprune
from vtprune.testing import llava_inputs, tiny_llava
from vtprune.testing.matrix import markdown

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    # Budgets in README are for hundreds of tokens; a picture of 32 x 32 tokens has them.
    model = tiny_llava(patches=32)
    inputs = {**llava_inputs([[1, 10, "image", 11, 12]], n_tokens=1024, size=256), "max_new_tokens": 2}
    namespace = {"model": model, "inputs": inputs, "vtprune": vtprune}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102 - our own README
    assert namespace["patch"].report().engaged


def test_matrix_is_the_generated_one() -> None:
    found = re.search(
        r"<!-- matrix: .*? -->\n(.*?)\n<!-- /matrix -->", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    assert found[1].strip() == markdown(), "update README with the output of `vtprune models --matrix`"

"""Every command of README and docs/lmms-eval.md runs with the real lmms-eval."""

import os
import subprocess
import sys
from pathlib import Path

from lmms.common import REFERENCE, needs_lmms, row_of, write_rows
from pages import DOCS, ROOT, blocks, commands

pytestmark = needs_lmms

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
            row_of(name, keep, "gqa", "exact_match", 0.5) for name, keep in (("dense", None), ("fastv", 64))
        ]
        write_rows(folder / words[2], rows)
    return words, environment


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

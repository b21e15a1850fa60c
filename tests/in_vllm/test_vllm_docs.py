"""What docs/vllm.md shows works in real vLLM."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from in_vllm.server import Server
from pages import ROOT, blocks, commands
from transformers import AutoConfig

from vtprune.eval.world import examples, reference_dir
from vtprune.integrations.vllm_plugin.settings import pruning_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def code(language: str) -> list[str]:
    """Blocks of a language."""
    return [text for name, text in BLOCKS if name == language]


def test_there_are_blocks() -> None:
    assert code("python")
    assert code("bash")


def test_settings_that_are_shown_are_right() -> None:
    overrides = [
        json.loads(found) for found in re.findall(r"--hf-overrides '(.*?)'", "\n".join(code("bash")))
    ]
    overrides += [json.loads(text) for text in code("json")]
    assert len(overrides) >= 2
    for one in overrides:
        config = AutoConfig.from_pretrained(reference_dir("llava"))
        config.vtprune = one["vtprune"]
        assert pruning_of(config, None).left(144) < 144


def test_scripts_that_are_shown_exist() -> None:
    for line in "\n".join(code("bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        for word in words:
            if word.endswith(".py") or word.startswith(".ci/"):
                assert (PAGE.parents[1] / word).is_file(), word


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    needs_vllm()
    namespace: dict[str, object] = {}
    for text in code("python"):
        small = text.replace('"llava-hf/llava-1.5-7b-hf"', "str(FOLDER)").replace('"photo.jpg"', "PHOTO")
        exec(PREPARE + small, namespace)  # noqa: S102
    assert "prompt tokens" in capsys.readouterr().out


def needs_vllm() -> None:
    """Skips where there is no vLLM."""
    pytest.importorskip(
        "vllm", reason="vLLM is not installed; `bash .ci/vllm` makes an environment for these tests"
    )


SHOWN = [
    words
    for page in (ROOT / "README.md", PAGE)
    for block in blocks(page)
    if block.reason == "needs vLLM" and block.language != "python"
    for line, _ in commands(block)
    for words in line
    if words[0] != "pip"
]
HUB = "llava-hf/llava-1.5-7b-hf"
# On a CPU with the small model, whose prompts have fewer tokens.
CPU = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size", "32"]
CPU += ["--distributed-executor-backend", "uni"]


def test_commands_are_of_known_kinds() -> None:
    assert {tuple(words[:2]) for words in SHOWN} == {("vllm", "serve"), ("python", "tests/in_vllm/bench.py")}


@pytest.mark.parametrize("words", [w for w in SHOWN if w[0] == "vllm"], ids=["readme", "page"])
def test_served_as_shown(words: list[str], tmp_path: Path) -> None:
    needs_vllm()
    assert words[2] == HUB
    options = words[3:]
    with Server(reference_dir("llava"), None, tmp_path / "log", *options, *CPU) as server:
        item = examples("test", 1)[0]
        answer = server.ask(server.client(), item.question, [item.image])
    assert answer.text
    assert answer.prompt_tokens < 144, "nothing was pruned"


def test_bench_as_shown() -> None:
    needs_vllm()
    (words,) = [w for w in SHOWN if w[0] == "python"]
    assert HUB in words
    folder = str(reference_dir("llava"))
    given = [folder if word == HUB else word for word in words[1 : words.index("--")]]
    done = subprocess.run(
        [sys.executable, *given, "--requests", "2", "--tokens", "2", "--", *CPU],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^\| vLLM \|", done.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^\| vLLM \+ vtprune", done.stdout, re.MULTILINE)) == 3


PREPARE = """
import tempfile
from vtprune.eval.world import examples, reference_dir
FOLDER = reference_dir("llava")
PHOTO = tempfile.mkdtemp() + "/photo.png"
examples("test", 1)[0].image.save(PHOTO)
"""

"""What docs/vllm.md shows works in real vLLM."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoConfig

from vtprune.eval.world import reference_dir
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
    pytest.importorskip(
        "vllm", reason="vLLM is not installed; `bash .ci/vllm` makes an environment for these tests"
    )
    namespace: dict[str, object] = {}
    for text in code("python"):
        small = text.replace('"llava-hf/llava-1.5-7b-hf"', "str(FOLDER)").replace('"photo.jpg"', "PHOTO")
        exec(PREPARE + small, namespace)  # noqa: S102
    assert "prompt tokens" in capsys.readouterr().out


PREPARE = """
import tempfile
from vtprune.eval.world import examples, reference_dir
FOLDER = reference_dir("llava")
PHOTO = tempfile.mkdtemp() + "/photo.png"
examples("test", 1)[0].image.save(PHOTO)
"""

"""The fenced blocks of README and docs/, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PROGRAMS = ("vtprune ", "python ", "bash ", "pip ")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language and lines, why it is not run, and the output shown behind it."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. One without a language is code if it begins with a prompt or a program, else text.

    A `text` block that directly follows a `python` block is its output, or the error that it raises.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    start: int | None = None
    behind = -2
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        text = "\n".join(lines[start + 1 : number]) + "\n"
        language = lines[start][3:].strip()
        if not language:
            language = "console" if text.startswith("$ ") else "bash" if text.startswith(PROGRAMS) else "text"
        marker = re.fullmatch(r"<!-- not run: (.*) -->", lines[start - 1]) if start else None
        between = [one for one in lines[behind + 1 : start] if one.strip()]
        if language == "text" and found and found[-1].language == "python" and behind >= 0 and not between:
            found[-1] = Block(**{**vars(found[-1]), "output": text})
        found.append(Block(page.name, start + 1, language, text, marker and marker[1], None))
        start, behind = None, number
    assert start is None, f"{page.name}: the fence in line {(start or 0) + 1} is not closed"
    return found


def commands(block: Block) -> Iterator[tuple[list[list[str]], str]]:
    """The command lines of a block, each as its commands, with the output shown below it."""
    if block.language == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            yield split(line), ""
        return
    for part in re.split(r"^\$ ", block.text.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield split(line), output.strip()


def split(line: str) -> list[list[str]]:
    """Arguments of the commands of a line, which `;` and `&&` separate; a comment ends it."""
    words = shlex.shlex(line, posix=True, punctuation_chars=";&")
    words.whitespace_split = True
    out: list[list[str]] = [[]]
    for word in words:
        if set(word) <= {";", "&"}:
            out.append([])
        else:
            out[-1].append(word)
    return [one for one in out if one]

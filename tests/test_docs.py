"""What README and docs/ say is run: every code block, every command, every output that they show."""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, PAGES, ROOT, Block, blocks, commands
from PIL import Image, ImageChops, ImageStat

import vtprune
from vtprune.errors import VTPruneError
from vtprune.eval import cli, explanations, gallery
from vtprune.eval.cli import main
from vtprune.eval.prompts import Prompter, load_model
from vtprune.eval.training import command as training
from vtprune.eval.world import examples, reference_dir
from vtprune.eval.world import video as video_world
from vtprune.testing.matrix import markdown, summary

RUN = ("python", "console", "bash")
SHOWN = ("text", "json", "yaml", "toml", "html")  # output, formulas and files
# Why a block is not run here, and how many such blocks there may be. `.ci/run` installs as README does; tests/lmms runs those that need
# lmms-eval, tests/in_vllm those that need vLLM.
REASONS = ("installs", "needs vLLM", "needs lmms-eval")
MOST_NOT_RUN = {"README.md": 4, "lmms-eval.md": 7, "vllm.md": 4}
# A command of the documentation is made small by these options, unless it gives them itself. `--limit` is always 1.
SMALL = {
    "eval": ("--limit", "1", "--split", "test", "--task", "text"),
    "eval --suite video": (
        *("--limit", "1", "--task", "needle", "--select", "uniform", "--frames", "2"),
        *("--method", "evs", "--keep", "0.5", "--jobs", "1"),
    ),
    "explanations": ("--limit", "1", "--method", "dart"),
    "search": ("--samples", "6", "--trials", "2"),
    "train": ("--steps", "1", "--questions", "1", "--batch-size", "6"),
    "video-qa": ("--candidates", "8"),
}
MODULES = {"explanations": explanations.main}
OPTIONFLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load_model(str(reference_dir("llava")), "cpu", "auto")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page's blocks run: photo.jpg, clip.mp4, clips/, DIR (a checkpoint) as the pages name them."""
    monkeypatch.chdir(tmp_path)
    examples("test", 2)[9].image.save("photo.jpg", quality=95)
    clip = video_world.examples("test", 2)[1]
    (tmp_path / "clips").mkdir()
    shutil.copy(clip.path(), "clip.mp4")
    shutil.copy("clip.mp4", "clips/clip.mp4")
    (tmp_path / "DIR").mkdir()
    for file in reference_dir("llava").glob("*.*"):
        (tmp_path / "DIR" / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are timed once, and training is validated on one question of each kind."""
    monkeypatch.setattr(cli, "evaluate", partial(cli.evaluate, rounds=1))
    monkeypatch.setattr(training, "train", partial(training.train, val_per_kind=1))


def namespace_of(reference: tuple[Any, Any]) -> dict[str, Any]:
    """What Python blocks find: the shipped LLaVA, and a question about a picture ready for it."""
    model, processor = reference
    example = examples("test", 2)[9]
    inputs = Prompter(model, processor).inputs([example.image], [example.question])
    return {
        "__name__": "__main__",
        "vtprune": vtprune,
        "model": model,
        "processor": processor,
        "inputs": inputs,
        "image": example.image,
        "question": example.question,
    }


def matches(want: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(want.strip() + "\n", got.strip() + "\n", OPTIONFLAGS)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a block; an output that begins with the name of an error is one that it has to raise."""
    printed = io.StringIO()
    name = (block.output or "").partition(":")[0]
    raised = ""
    code = compile("\n" * block.line + block.text, block.page, "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)  # noqa: S102 - our own documentation
    except Exception as error:
        if not name.endswith("Error"):
            raise AssertionError(f"{block}: {traceback.format_exc()}") from error
        raised = f"{type(error).__name__}: {error}"
    got = raised or printed.getvalue()
    if block.output is not None:
        assert matches(block.output, got), f"{block} shows\n{block.output}\nbut gives\n{got}"


def run_command(words: list[str], where: str) -> str:
    """What a command prints. `pip install vtprune[...]` is not run: its extras must exist."""
    if words[:2] == ["pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        known = re.findall(r"^([\w-]+) = ", extras, re.MULTILINE)
        for extra in re.findall(r"vtprune\[(.*?)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(known), f"{where}: there is no extra {extra!r}"
        return ""
    if words[:2] == ["open", "xdg-open"]:
        return ""
    if words[:3] == ["python", "-m", "pytest"]:
        return collected(words[3:], where)
    module = words[2].removeprefix("vtprune.eval.") if words[:2] == ["python", "-m"] else ""
    assert words[0] == "vtprune" or module in MODULES, (
        f"{where}: {words[0]!r} is not run by this test; mark the block as not run"
    )
    given = words[3:] if module else words[1:]
    video = " --suite video" if "video" in given else ""
    small = SMALL.get((module or "".join(given[:1])) + video, ())
    for option, value in zip(small[::2], small[1::2], strict=True):
        if option not in words and "--help" not in words:
            given += [option, value]
    if "--limit" in given:
        given[given.index("--limit") + 1] = "1"
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            code = MODULES[module](given) or 0 if module else main(given)
        except SystemExit as end:
            code = int(end.code or 0)
    output = printed.getvalue()
    if code == 2:
        return output + errors.getvalue()
    assert code == 0, f"{where}: {shlex.join(words)} ended with {code}: {errors.getvalue()[-2000:]}"
    return output


def collected(given: list[str], where: str) -> str:
    """The tests that a command would run, which has to find some. They are part of this suite anyway."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{where}: {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, reference: tuple[Any, Any], desk: Path) -> None:
    namespace = namespace_of(reference)
    try:
        for block in blocks(page):
            if block.reason is not None or block.language not in RUN:
                continue
            if block.language == "python":
                run_python(block, namespace)
                continue
            for line, output in commands(block):
                got = "".join(run_command(words, str(block)) for words in line)
                failed = got.startswith("vtprune: ")
                assert not failed or output.startswith("vtprune: "), f"{block}: {got}"
                assert not output or matches(output, got), f"{block} shows\n{output}\nbut gives\n{got}"
    finally:
        with contextlib.suppress(VTPruneError):
            vtprune.unpatch(reference[0])
        reference[0].eval()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_that_are_not_run_are_few_and_say_why(page: Path) -> None:
    found = blocks(page)
    assert {block.language for block in found} <= {*RUN, *SHOWN}, "unknown language of a block"
    skipped = [block for block in found if block.reason is not None]
    assert len(skipped) <= MOST_NOT_RUN.get(page.name, 0), f"{page.name}: too many blocks are not run"
    for block in skipped:
        assert str(block.reason).startswith(REASONS), f"{block}: {block.reason!r} is no reason"
        assert block.language in RUN, f"{block}: only code needs a reason"
        if block.language == "python":
            ast.parse(block.text)


def test_this_file_notices_wrong_blocks(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(6 * 7)\n```\n\n```text\n41\n```\n\n"
        '```python\nvtprune.patch(model, "fastvv")\n```\n```text\nUnknownMethodError: ...\n```\n'
        "```\n$ vtprune show; vtprune methods  # both\n```\nbetween\n\n```text\nno output\n```\n",
        encoding="utf-8",
    )
    first, _, second, _, third, _ = blocks(page)
    with pytest.raises(AssertionError, match="42"):
        run_python(first, {})
    run_python(second, namespace_of(reference))
    with pytest.raises(AssertionError, match="but gives"):
        run_python(Block(**{**vars(second), "output": "VTPruneError: ..."}), namespace_of(reference))
    with pytest.raises(AssertionError, match="NameError"):
        run_python(Block(**{**vars(first), "text": "missing\n", "output": None}), {})
    assert list(commands(third)) == [([["vtprune", "show"], ["vtprune", "methods"]], "")]
    assert third.output is None
    with pytest.raises(AssertionError, match="no extra"):
        run_command(["pip", "install", "vtprune[nonsense]"], "here")
    with pytest.raises(AssertionError, match="not run by this test"):
        run_command(["rm", "-r", "x"], "here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            dead.append(target)
    assert not dead, f"{page.name}: {dead}"


def anchors(page: Path) -> set[str]:
    """What headings of a page are called by links, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)", (DOCS / "index.md").read_text(encoding="utf-8")))
    assert listed >= {page.name for page in DOCS.glob("*.md")} - {"index.md"}


@pytest.mark.parametrize(
    ("page", "mark", "made"),
    [(DOCS / "models.md", "matrix", markdown), (ROOT / "README.md", "models", summary)],
)
def test_tables_of_models_are_the_generated_ones(page: Path, mark: str, made: Callable[[], str]) -> None:
    found = re.search(
        rf"<!-- {mark}: (.*?) -->\n(.*?)\n<!-- /{mark} -->", page.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    assert found[2].strip() == made(), f"update {page.name} with the output of `{found[1]}`"


@pytest.fixture(scope="module")
def kept() -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = json.loads((DOCS / gallery.KEPT).read_text(encoding="utf-8"))
    return found


STALE = "run `python -m vtprune.eval.gallery docs`"


def test_gallery_shows_what_methods_keep_today(kept: dict[str, list[list[int]]]) -> None:
    assert sorted(kept) == gallery.drawn_methods(), STALE
    for key, pictures in kept.items():
        for then, now in zip(pictures, gallery.kept(key), strict=True):
            # Another processor may round a near tie the other way.
            assert len({*then} & {*now}) >= 0.9 * max(len(then), len(now)), f"{key}: {STALE}"


def test_gallery_page_is_the_generated_one(kept: dict[str, list[list[int]]]) -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert page == gallery.between(page, gallery.gallery(kept)), STALE


def test_gallery_pictures_show_the_kept_tokens(kept: dict[str, list[list[int]]]) -> None:
    files = {path.stem: path for path in (DOCS / gallery.FOLDER).glob("*.png")}
    assert sorted(files) == gallery.drawn_methods(), STALE
    assert sum(path.stat().st_size for path in files.values()) < 3 * 2**20
    for key, path in files.items():
        shown = Image.open(path).convert("RGB")
        drawn = gallery.draw(key, kept[key]).convert("RGB")
        assert shown.size == drawn.size, STALE
        # Versions of Pillow choose palettes a little differently; a token more or less is far more than that.
        assert max(ImageStat.Stat(ImageChops.difference(shown, drawn)).mean) < 2, f"{key}: {STALE}"


def test_a_wrong_picture_is_noticed(kept: dict[str, list[list[int]]]) -> None:
    right, wrong = (gallery.draw("fastv", [some]) for some in (kept["fastv"][0], kept["fastv"][0][:-3]))
    difference = ImageChops.difference(right.convert("RGB"), wrong.convert("RGB"))
    assert max(ImageStat.Stat(difference).mean) > 2


@pytest.mark.parametrize("name", vtprune.__all__)
def test_public_names_are_documented(name: str) -> None:
    """Every public object has a docstring, and one that raises says what."""
    thing = getattr(vtprune, name)
    assert inspect.getdoc(thing), f"vtprune.{name} has no docstring"
    if inspect.ismodule(thing):
        return
    for member in [thing] if inspect.isfunction(thing) else public_functions(thing):
        told = inspect.getdoc(member)
        assert told, f"vtprune.{name}.{member.__name__} has no docstring"
        source = inspect.getsource(member)
        body = source.replace(member.__doc__ or "", "")
        if re.search(r"^\s+raise ", body, re.MULTILINE):
            assert "Raises" in told, f"vtprune.{name}.{member.__name__} raises and does not say what"
        hints = inspect.signature(member)
        for parameter in hints.parameters.values():
            if parameter.name not in ("self", "cls"):
                assert parameter.annotation is not parameter.empty, (
                    f"{name}.{member.__name__}: {parameter.name}"
                )
        assert hints.return_annotation is not hints.empty, f"vtprune.{name}.{member.__name__} gives no type"


def public_functions(cls: type) -> list[Any]:
    """The functions that a class defines itself, of which its docstring does not speak already."""
    out = []
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function):
            out.append(function)
    return out


def helps() -> dict[str, str]:
    """The help of the command and of all its subcommands."""
    parser = cli._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {"": parser.format_help(), **{name: one.format_help() for name, one in commands.choices.items()}}


def test_help_explains_what_this_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    told = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("visual tokens", "start here", "vtprune.patch(model", "--help"):
        assert word in told
    for name, text in helps().items():
        body = text.partition("\n\n")[2].partition("\n\n")[0]
        assert len(body.split()) >= 8, f"vtprune {name} --help does not say what it does"
        assert max(map(len, text.splitlines())) <= 140


def test_commands_in_help_are_right() -> None:
    """Every command line that a help shows can be parsed."""
    found = 0
    for text in helps().values():
        for line in re.findall(r"^ +vtprune (?!\[|COMMAND)(.*)$", text, re.MULTILINE):
            words = shlex.split(re.split(r"\s{3,}", line)[0])
            if words and words[0] in helps() and "..." not in words:
                cli._parser().parse_args(words)
                found += 1
    assert found >= 15

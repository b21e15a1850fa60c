"""Tables of the video suite, for the terminal and as Markdown.

python -m vtprune.eval.video.tables results.jsonl [SPLIT]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..results import ALL
from ..tables import percent, short
from .results import NEEDS_VISION, FrameComparison, VideoRow, read_line
from .settings import ALL_FRAMES, NO_VIDEO

ACCURACY, FRAMES, COST = "accuracy", "frames", "cost"
DASH = "–"  # noqa: RUF001 - a dash as tables have it


def read_rows(path: Path) -> list[VideoRow]:
    """Rows of a `results.jsonl` of the video suite."""
    return [read_line(line) for line in path.read_text(encoding="utf-8").splitlines()]


def select_label(row: VideoRow) -> str:
    """Selector and options of a row, without the number of frames and the draws."""
    options = {k: v for k, v in row.select_options.items() if k not in ("seeds", "captions")}
    text = " ".join([row.select, *(f"{k}={v}" for k, v in options.items())])
    return text + (" + caption" if row.select_options.get("captions") else "")


def frames_label(row: VideoRow) -> str:
    """The frames of a row: selector and number, or all of them."""
    if row.method == NO_VIDEO:
        return "grey frames"
    return ALL_FRAMES if row.frames is None else f"{select_label(row)}, {row.frames}"


def tokens_label(row: VideoRow) -> str:
    """The token method of a row with options and budget."""
    options = " ".join(f"{k}={v}" for k, v in row.options.items() if k != "seeds")
    return f"{row.method} {options}".strip() + ("" if row.keep is None else f" {row.keep}")


def by_setting(rows: Sequence[VideoRow], split: str) -> list[dict[str, VideoRow]]:
    """Rows of a split, task -> row for every setting in the order in which they ran."""
    settings: dict[tuple[str, str], dict[str, VideoRow]] = {}
    for row in rows:
        if row.split == split:
            settings.setdefault((frames_label(row), tokens_label(row)), {})[row.task] = row
    return list(settings.values())


def cells(rows: Sequence[VideoRow], split: str, kind: str) -> tuple[list[str], list[list[str]]]:
    """Column names and lines of a table.

    Args:
        rows: of one run.
        split: which of its splits.
        kind: "accuracy", "frames" (the choice itself, each selector once per number of frames) or "cost".
    """
    settings = by_setting(rows, split)
    tasks = [task for task in settings[0] if task not in (ALL, NEEDS_VISION)]
    names = ["frames", "tokens"]
    lines = []
    if kind == ACCURACY:
        names += ["kept", *tasks, *([NEEDS_VISION] if NEEDS_VISION in settings[0] else []), ALL, "retained"]
        for setting in settings:
            row = setting[ALL]
            seeing = [percent(s.accuracy, s.stderr) for task, s in setting.items() if task == NEEDS_VISION]
            lines.append(
                [
                    frames_label(row),
                    tokens_label(row),
                    str(row.visual_tokens_out),
                    *(short(setting[task]) for task in tasks),
                    *seeing,
                    percent(row.accuracy, row.stderr),
                    percent(row.retained),
                ]
            )
    elif kind == FRAMES:
        recalled = [task for task in tasks if any(s[task].recall is not None for s in settings)]
        names = ["frames", "recall", *recalled, "tau", "random tau", "rho", "random rho", "select ms"]
        seen = set()
        for setting in settings:
            row = setting[ALL]
            if row.frames is None or row.method == NO_VIDEO or frames_label(row) in seen:
                continue
            seen.add(frames_label(row))
            lines.append(
                [
                    frames_label(row),
                    percent(row.recall),
                    *(percent(setting[task].recall) for task in recalled),
                    *(_number(value) for value in (row.tau, row.random_tau, row.rho, row.random_rho)),
                    DASH if row.select_ms is None else f"{row.select_ms:.0f}",
                ]
            )
    else:
        names += ["in → out", "layer average", "KV KiB", "GFLOPs", "TTFT ms", "ms/token", "peak MiB"]
        measured = set()
        for setting in settings:
            row = setting[ALL]
            key = (row.frames, tokens_label(row))
            if key in measured or row.method == NO_VIDEO:
                continue
            measured.add(key)
            lines.append(
                [
                    ALL_FRAMES if row.frames is None else str(row.frames),
                    tokens_label(row),
                    f"{row.visual_tokens_in} → {row.visual_tokens_out}",
                    f"{row.layer_average_tokens:.1f}",
                    f"{row.kv_bytes / 1024:.0f}",
                    f"{row.flops / 1e9:.3f}",
                    f"{row.ttft_ms:.1f}",
                    f"{row.decode_ms_per_token:.2f}",
                    f"{row.peak_mib:.1f}",
                ]
            )
    return names, lines


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:+.3f}"


def titles(rows: Sequence[VideoRow], split: str) -> dict[str, str]:
    """A title for every kind of table."""
    overall = by_setting(rows, split)[0][ALL]
    return {
        ACCURACY: f"Accuracy in % on split {split!r}, {overall.n} questions, {overall.candidates} candidate frames "
        "(± standard error)",
        FRAMES: "Frames: relevant moments hit in %, rank correlation of the scores with them beside random scores, time",
        COST: "Cost of one question (batch size 1, frames given; times and FLOPs with the vision encoder)",
    }


def tables(rows: Sequence[VideoRow], split: str) -> list[Table]:
    """All tables of a split for the terminal."""
    out = []
    for kind, title in titles(rows, split).items():
        names, lines = cells(rows, split, kind)
        if not lines:
            continue
        table = Table(title=title)
        for number, name in enumerate(names):
            left = number == 0 or name == "tokens"
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        out.append(table)
    return out


def markdown(rows: Sequence[VideoRow], split: str) -> str:
    """All tables of a split as Markdown."""
    parts = []
    for kind, title in titles(rows, split).items():
        names, lines = cells(rows, split, kind)
        if lines:
            ruler = "|---" + "|--:" * (len(names) - 1) + "|"
            parts.append("\n".join([f"{title}:\n", _line(names), ruler, *map(_line, lines)]))
    return "\n\n".join(parts)


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def comparison_table(comparisons: Sequence[FrameComparison]) -> Table:
    """Selectors against the baseline."""
    first = comparisons[0]
    table = Table(
        title=f"Selectors minus {first.other!r} on the same questions and frames, in points (± standard error)"
    )
    for name in ("frames", "selector", "questions", "n", "difference", "p"):
        table.add_column(name, justify="right" if name in ("n", "difference", "p") else "left", no_wrap=True)
    before = None
    for one in comparisons:
        if before not in (None, one.frames):
            table.add_section()
        before = one.frames
        error = "" if one.result.stderr is None else f" ±{100 * one.result.stderr:.1f}"
        table.add_row(
            str(one.frames),
            one.select,
            one.task,
            str(one.result.n),
            f"{100 * one.result.difference:+.1f}{error}",
            f"{one.result.p:.2g}",
        )
    return table


if __name__ == "__main__":
    found = read_rows(Path(sys.argv[1]))
    print(markdown(found, sys.argv[2] if len(sys.argv) > 2 else found[0].split))

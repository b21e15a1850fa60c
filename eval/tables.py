"""Tables of a comparison, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .paired import Comparison
from .plots import label
from .results import ALL, Row


def percent(value: float | None, error: float | None = None) -> str:
    """A share as a percentage with its standard error, or a dash."""
    if value is None:
        return "–"  # noqa: RUF001 - a dash as tables have it
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ±{100 * error:.1f}"


def budget(row: Row) -> str:
    """The budget of a row, or a dash."""
    return "–" if row.keep is None else str(row.keep)  # noqa: RUF001 - a dash as tables have it


def short(row: Row) -> str:
    """Accuracy and standard error in whole percent."""
    return f"{100 * row.accuracy:.0f}" + ("" if row.stderr is None else f" ±{100 * row.stderr:.0f}")


def by_setting(rows: Sequence[Row], split: str) -> list[dict[str, Row]]:
    """Rows of a split, task -> row for every setting in the order in which they ran."""
    settings: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.split == split:
            settings.setdefault((label(row), budget(row)), {})[row.task] = row
    return list(settings.values())


def accuracy_table(rows: Sequence[Row], split: str) -> Table:
    """Accuracy with standard error per task of one split."""
    settings = by_setting(rows, split)
    tasks = [task for task in settings[0] if task != ALL]
    overall = settings[0][ALL]
    before = None
    table = Table(title=f"Accuracy in % on split {split!r}, {overall.n} questions (± standard error)")
    table.add_column("method", no_wrap=True)
    for name in ("keep", "tokens", *tasks, "all", "retained"):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "all" else "")
    for setting in settings:
        row = setting[ALL]
        if before not in (None, label(row)) and row.keep is not None:
            table.add_section()
        before = label(row)
        table.add_row(
            before,
            budget(row),
            str(row.visual_tokens_out),
            *(short(setting[task]) for task in tasks),
            percent(row.accuracy, row.stderr),
            percent(row.retained),
        )
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One method against the others at the same budget, all kinds together, the best rival of a budget first."""
    first = comparisons[0]
    table = Table(
        title=f"{first.method} minus the others on the same questions, in points (± standard error)"
    )
    for name in ("split", "keep", "other"):
        table.add_column(name, no_wrap=True)
    for name in ("difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for one in comparisons:
        if one.task != ALL:
            continue
        if before not in (None, (one.split, one.keep)):
            table.add_section()
        before = (one.split, one.keep)
        error = "" if one.result.stderr is None else f" ±{100 * one.result.stderr:.1f}"
        table.add_row(
            one.split,
            str(one.keep),
            one.other,
            f"{100 * one.result.difference:+.1f}{error}",
            f"{one.result.p:.2g}",
        )
    return table


def cost_table(rows: Sequence[Row]) -> Table:
    """What every setting costs at batch size 1."""
    table = Table(title="Cost of one question (batch size 1, times and FLOPs with the vision encoder)")
    table.add_column("method", no_wrap=True)
    for name in (
        "keep",
        "tokens",
        "layer average",
        "KV KiB",
        "GFLOPs",
        "TTFT ms",
        "ms/token",
        "peak MiB",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    seen = set()
    for row in rows:
        key = (label(row), budget(row))
        if row.task == ALL and key not in seen:
            seen.add(key)
            table.add_row(
                label(row),
                budget(row),
                f"{row.visual_tokens_in} → {row.visual_tokens_out}",
                f"{row.layer_average_tokens:.1f}",
                f"{row.kv_bytes / 1024:.0f}",
                f"{row.flops / 1e9:.3f}",
                f"{row.ttft_ms:.1f}",
                f"{row.decode_ms_per_token:.2f}",
                f"{row.peak_mib:.1f}",
            )
    return table

"""Curves of a comparison as SVG that can stand inside an HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from .results import ALL, Row
from .settings import DENSE, DOWNSAMPLE, NO_IMAGE

# Okabe and Ito's colours, which most colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BASELINES = ("random", "stride", DOWNSAMPLE)  # drawn dashed

Abscissa = Callable[[Row], float]
AXES: dict[str, tuple[str, Abscissa]] = {
    "tokens": ("visual tokens left at the end", lambda row: row.visual_tokens_out),
    "average": ("visual tokens, averaged over decoder layers", lambda row: row.layer_average_tokens),
    "flops": ("GFLOPs of the prefill, vision encoder included", lambda row: row.flops / 1e9),
}
WIDTH = 4.8  # inches; about a phone's width at the size of the text around it
DODGE = 1.012  # methods with the same number of tokens are moved apart by this factor


def label(row: Row) -> str:
    """Method and options of a row, without the budget and the draws."""
    options = " ".join(f"{k}={v}" for k, v in row.options.items() if k != "seeds")
    return f"{row.method} {options}".strip()


def curves(rows: Sequence[Row], axis: str) -> str:
    """Accuracy of every method over one of `AXES`, for the rows of one split and all tasks together."""
    figure, axes = _figure(1, 1, (WIDTH, 4.4))
    rows = [row for row in rows if row.task == ALL]
    _draw(axes[0], rows, axis)
    axes[0].set_xlabel(AXES[axis][0])
    axes[0].set_ylabel("accuracy, %")
    _legend(figure, axes[0])
    return _svg(figure, f"{axis}-{rows[0].split if rows else ''}")


def small_multiples(rows: Sequence[Row], axis: str = "tokens") -> str:
    """One panel per task over one of `AXES`, for the rows of one split."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.task != ALL))
    n_rows = -(-len(tasks) // 2)
    figure, axes = _figure(n_rows, 2, (WIDTH, 1.9 * n_rows + 1.2))
    for ax, task in zip(axes, tasks, strict=False):
        _draw(ax, [row for row in rows if row.task == task], axis, percentages=False)
        ax.set_title(task, fontsize=10)
        ax.set_ylim(-3, 103)
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(tasks) - 2) : len(tasks)]:
        ax.set_xlabel(AXES[axis][0], fontsize=9)
    for ax in axes[::2]:
        ax.set_ylabel("accuracy, %", fontsize=9)
    _legend(figure, axes[0])
    return _svg(figure, f"kinds-{axis}-{rows[0].split if rows else ''}")


def _figure(rows: int, cols: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, cols, sharex=True, squeeze=False)
    for ax in axes.flat:
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, list(axes.flat)


def _legend(figure: Any, ax: Any) -> None:
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)


def _draw(ax: Any, rows: Sequence[Row], axis: str, percentages: bool = True) -> None:
    x = AXES[axis][1]
    spread = DODGE if axis == "tokens" else 1.0
    for row in rows:
        percent, error = 100 * row.accuracy, 100 * (row.stderr or 0)
        value = f" ({percent:.1f} %)" if percentages else ""
        if row.method == DENSE:
            ax.axhline(percent, color="black", linewidth=0.8)
            ax.axhspan(percent - error, percent + error, color="black", alpha=0.08, linewidth=0)
            ax.plot([x(row)], [percent], "k*", markersize=8, label=f"dense{value}")
        elif row.method == NO_IMAGE:
            ax.axhline(percent, color="black", linewidth=1, linestyle=":", label=f"no image{value}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.keep is not None:
            groups.setdefault(label(row), []).append(row)
    for number, (name, points) in enumerate(groups.items()):
        points.sort(key=x)
        factor = spread ** (number - (len(groups) - 1) / 2)
        ax.errorbar(
            [x(p) * factor for p in points],
            [100 * p.accuracy for p in points],
            [100 * (p.stderr or 0) for p in points],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.3,
            linestyle="--" if points[0].method in BASELINES else "-",
            capsize=1.5,
            elinewidth=0.7,
        )
    if axis in ("tokens", "average"):
        from matplotlib.ticker import NullLocator

        ax.set_xscale("log", base=2)
        ticks = sorted({row.visual_tokens_out for row in rows if row.method not in (NO_IMAGE, DOWNSAMPLE)})
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows SVG without it
    # Without a fixed size the view box fills whatever width there is.
    return re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)

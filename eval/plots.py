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
    "flops": ("GFLOPs of the prefill with the vision encoder", lambda row: row.flops / 1e9),
    "time": ("time to first token with the vision encoder, ms", lambda row: row.ttft_ms),
}


def label(row: Row) -> str:
    """Method and options of a row, without the budget and the draws."""
    options = " ".join(f"{k}={v}" for k, v in row.options.items() if k != "seeds")
    return f"{row.method} {options}".strip()


def curves(rows: Sequence[Row], axis: str) -> str:
    """Accuracy of every method over one of `AXES`, for the rows of one split and all tasks together."""
    figure, axes = _figure(1, 1, (6.4, 4.6))
    rows = [row for row in rows if row.task == ALL]
    _draw(axes[0], rows, AXES[axis][1])
    axes[0].set_xlabel(AXES[axis][0])
    axes[0].set_ylabel("accuracy, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return _svg(figure, f"{axis}-{rows[0].split if rows else ''}")


def small_multiples(rows: Sequence[Row], axis: str = "tokens") -> str:
    """One panel per task over one of `AXES`, for the rows of one split."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.task != ALL))
    n_rows = -(-len(tasks) // 2)
    figure, axes = _figure(n_rows, 2, (6.4, 2.3 * n_rows + 1.0))
    for ax, task in zip(axes, tasks, strict=False):
        _draw(ax, [row for row in rows if row.task == task], AXES[axis][1])
        ax.set_title(task, fontsize=10)
        ax.set_ylim(-3, 103)
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    figure.supxlabel(AXES[axis][0], fontsize=10)
    figure.supylabel("accuracy, %", fontsize=10)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
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


def _draw(ax: Any, rows: Sequence[Row], x: Abscissa) -> None:
    for row in rows:
        percent, error = 100 * row.accuracy, 100 * (row.stderr or 0)
        if row.method == DENSE:
            ax.axhline(percent, color="black", linewidth=1, label=f"dense ({percent:.1f} %)")
            ax.axhspan(percent - error, percent + error, color="black", alpha=0.08, linewidth=0)
        elif row.method == NO_IMAGE:
            ax.axhline(
                percent, color="black", linewidth=1, linestyle=":", label=f"no image ({percent:.1f} %)"
            )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.keep is not None:
            groups.setdefault(label(row), []).append(row)
    for number, (name, points) in enumerate(groups.items()):
        points.sort(key=x)
        ax.errorbar(
            [x(p) for p in points],
            [100 * p.accuracy for p in points],
            [100 * (p.stderr or 0) for p in points],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            linestyle="--" if points[0].method in BASELINES else "-",
            capsize=2,
            elinewidth=0.8,
        )


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows SVG without it
    # Fixed points become a view box that fills whatever width there is.
    return re.sub(r'(<svg[^>]*?) height="[^"]*"| width="[^"]*pt"', lambda m: m.group(1) or "", svg, count=2)

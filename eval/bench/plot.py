"""A picture of bench results: how much of the possible speed-up is reached."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any


def draw(results: Path) -> str:
    """SVG of all model rows of a results file: the speed-up of the time to the first token as bars, its limit as a mark.

    One panel per run, model shape, batch size and budget.
    """
    from matplotlib.figure import Figure

    groups: dict[tuple[str, Any], dict[str, dict[str, Any]]] = {}
    device = ""
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "model" and row["ttft_speedup"] is not None:
            what = f"{row['shape']}, {row['layers']} layers, batch {row['batch']}, keep {row['keep']:g}"
            # Ratios hold within one run, which its peaks tell from others.
            groups.setdefault((what, tuple(row["peaks"].values())), {})[row["method"]] = row
            device = f"{row['device']}, {row['dtype']}, torch {row['versions']['torch']}"
    height = 1.2 + sum(0.45 + 0.28 * len(rows) for rows in groups.values())
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots(
        len(groups), 1, squeeze=False, sharex=True, height_ratios=[1 + len(rows) for rows in groups.values()]
    )[:, 0]
    titles = [what for what, _ in groups]
    for number, (ax, rows) in enumerate(zip(axes, groups.values(), strict=True)):
        for y, row in enumerate(reversed(rows.values())):
            speedup = row["ttft_speedup"]
            usual = row["limit"] is None
            ax.barh(y, speedup["median"], color="#999999" if usual else "#0072B2", height=0.6)
            ax.plot([speedup["p20"], speedup["p80"]], [y, y], color="black", linewidth=1.2)
            if not usual:
                ax.plot(row["limit"], y, "|", color="#D55E00", markersize=14, markeredgewidth=2.5)
            share = "" if usual else f" ({100 * row['achieved']:.0f} % of the limit)"
            ax.text(0.03, y, f"{speedup['median']:.2f}x{share}", va="center", fontsize=8, color="white")
        ax.set_yticks(range(len(rows)), list(reversed(rows)), fontsize=9)
        runs = titles[: number + 1].count(titles[number])
        ax.set_title(titles[number] + (f" (run {runs})" if runs > 1 else ""), fontsize=10, loc="left")
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(left=0)
    axes[-1].set_xlabel(
        "speed-up of the time to the first token over the dense SDPA model\n"
        "orange: limit by FLOPs and bytes; grey: the usual way",
        fontsize=8,
    )
    figure.suptitle(device, fontsize=9)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

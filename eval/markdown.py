"""Tables of a comparison as Markdown, for README and for reports.

python -m vtprune.eval.markdown results.jsonl [SPLIT]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .plots import label
from .results import ALL, Row
from .tables import budget, by_setting, percent, short


def read_rows(path: Path) -> list[Row]:
    """Rows of a `results.jsonl`."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown_table(rows: Sequence[Row], split: str) -> str:
    """Accuracy and cost of one split as a Markdown table, for README; cost as ratios to the dense model."""
    settings = by_setting(rows, split)
    tasks = [task for task in settings[0] if task != ALL]
    dense = settings[0][ALL]
    names = [
        "method",
        "keep",
        "layer average",
        *tasks,
        "all",
        "retained",
        "FLOPs",
        "KV cache",
        "time to first token",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---" * 2 + "|--:" * (len(names) - 2) + "|"]
    for setting in settings:
        row = setting[ALL]
        cells = [
            label(row),
            budget(row),
            f"{row.layer_average_tokens:.0f}",
            *(short(setting[task]) for task in tasks),
            percent(row.accuracy, row.stderr),
            percent(row.retained),
            f"{row.flops / dense.flops:.2f}",
            f"{row.kv_bytes / dense.kv_bytes:.2f}",
            f"{row.ttft_ms / dense.ttft_ms:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary_table(rows: Sequence[Row], split: str) -> str:
    """One line per method, the best at the smallest budget first: accuracy at every budget; kinds and costs at the smallest.

    Cost as ratios to the dense model. Settings without a budget stand in front.
    """
    settings = by_setting(rows, split)
    dense = settings[0][ALL]
    methods: dict[str, list[dict[str, Row]]] = {}
    for setting in settings:
        methods.setdefault(label(setting[ALL]), []).append(setting)
    keeps = [s[ALL].keep for s in settings]
    budgets = sorted({keep for keep in keeps if keep is not None}, reverse=True)
    tasks = [task for task in settings[0] if task != ALL]
    names = [
        "method",
        *(f"{keep} tokens" for keep in budgets),
        *tasks,
        "layer average",
        "FLOPs",
        "time to first token",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]

    def rank(found: list[dict[str, Row]]) -> tuple[bool, float]:
        last = found[-1][ALL]
        return last.keep is not None, -last.accuracy

    for name, found in sorted(methods.items(), key=lambda item: rank(item[1])):
        at = {setting[ALL].keep: setting[ALL] for setting in found}
        least = found[-1]
        row = least[ALL]
        accuracies = [
            percent(at[keep].accuracy, at[keep].stderr)
            if keep in at
            else percent(row.accuracy, row.stderr)
            if row.keep is None
            else percent(None)
            for keep in budgets
        ]
        cells = [
            name,
            *accuracies,
            *(short(least[task]) for task in tasks),
            f"{row.layer_average_tokens:.0f}",
            f"{row.flops / dense.flops:.2f}",
            f"{row.ttft_ms / dense.ttft_ms:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = read_rows(Path(sys.argv[1]))
    part = sys.argv[2] if len(sys.argv) > 2 else found[0].split
    print(summary_table(found, part), markdown_table(found, part), sep="\n\n")

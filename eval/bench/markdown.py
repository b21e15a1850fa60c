"""Markdown tables of bench results: ``python -m vtprune.eval.bench.markdown RESULTS.jsonl``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def markdown(results: Path) -> str:
    """One table per run, model shape, depth, batch size and prompt length, and one of the kernels alone."""
    models: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    kernels: dict[tuple[str, str], dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "kernel":
            kernels[row["operation"], row["shape"]] = row
        else:
            # Ratios hold within one run, which its peaks tell from others.
            run = row["command"], row["peaks"]["flops"], row["peaks"]["bandwidth"]
            key = row["shape"], row["layers"], row["layers_of_model"], row["batch"], row["text_tokens"], run
            models.setdefault(key, {})[f"{row['method']} {row['keep']}"] = row
    parts = [_models(key, list(rows.values())) for key, rows in models.items()]
    if kernels:
        parts.append(_kernels(list(kernels.values())))
    return "\n\n".join(parts)


def _about(row: dict[str, Any]) -> str:
    versions, peaks = row["versions"], row["peaks"]
    driver = "" if row["driver"] is None else f", driver {row['driver']}"
    return (
        f"`{row['command']}` on {row['device']}{driver}, {row['dtype']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, vtprune {str(versions['vtprune_commit'])[:7]}; in this run the device reached "
        f"{peaks['flops'] / 1e12:.3g} TFLOP/s and {peaks['bandwidth'] / 1e9:.0f} GB/s of copies."
    )


def _models(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    shape, layers, real, batch, text, _ = key
    depth = "encoder alone" if not real else f"{layers} of {real} decoder layers"
    lines = [
        f"**{shape}**, {depth}, batch {batch} of {rows[0]['what']} with {text} text tokens"
        + (" on average" if batch > 1 else ""),
        "",
        "| method | tokens | time to first token, ms | speed-up [20 %, 80 %] | limit | achieved | encoder | prefill "
        + "| decode | deciding, ms | share of dense | peak MiB | of dense |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join([*lines, "", _about(rows[-1])])


def _cells(row: dict[str, Any]) -> list[str]:
    def times(name: str) -> str:
        return "" if row[name] is None else f"{row[name]['median']:.2f}"

    total, deciding = row["ttft_speedup"], row["deciding_ms"]
    return [
        row["method"],
        f"{row['tokens_in']} → {row['tokens_out']}" if row["tokens_out"] else "",
        f"{row['ttft_ms']['median']:.0f}",
        "" if total is None else f"{total['median']:.2f} [{total['p20']:.2f}, {total['p80']:.2f}]",
        "" if row["limit"] is None else f"{row['limit']:.2f}",
        "" if row["achieved"] is None else f"{row['achieved']:.2f}",
        times("encoder_speedup"),
        times("prefill_speedup"),
        times("decode_speedup"),
        "" if deciding is None else f"{deciding['median']:.1f}",
        "" if row["deciding_share"] is None else f"{100 * row['deciding_share']:.2f} %",
        f"{row['peak_mib']:.0f}",
        "" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}",
    ]


def _kernels(rows: list[dict[str, Any]]) -> str:
    lines = [
        "**Kernels alone**",
        "",
        "| operation | input | backend | dtype | ms | MiB to move | of the copy bandwidth |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        moved = "" if row["mib"] is None else f"{row['mib']:.1f}"
        share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
        cells = [
            f"`{row['operation']}`",
            row["shape"],
            row["backend"],
            row["dtype"],
            f"{row['ms']:.3f}",
            moved,
            share,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _about(rows[-1])])


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))

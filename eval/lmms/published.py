"""What papers report for token pruning, and an outcome beside it.

The figures stand in `published.yaml` with the source of each. Nothing is filled in: a benchmark that a source does not have
stays empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from ..prompts import EvaluationError
from .results import number

FILE = Path(__file__).resolve().parent / "published.yaml"
DENSE = "dense"
NONE = "–"  # noqa: RUF001 - a dash as tables have it


@dataclass(frozen=True)
class Benchmark:
    """A column of the papers' tables in lmms-eval.

    Attributes:
        task: the task, or a group without a metric of its own, whose tasks are then averaged.
        metrics: summed.
        scale: what its unit is multiplied by to get the papers'.
        protocol: how lmms-eval's differs from the papers'; empty where no difference is known.
        parts: tasks of a group; 0 for a task.
    """

    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    protocol: str = ""
    parts: int = 0


BENCHMARKS = {
    "GQA": Benchmark("gqa", ("exact_match",)),
    "MMB": Benchmark(
        "mmbench_en_dev_static",
        ("gpt_eval_score",),
        1.0,
        "options are matched in the answer without a judge; papers take LLaVA's own matching on the dev server",
    ),
    "MMB-CN": Benchmark("mmbench_cn_dev", ("gpt_eval_score",), 1.0, "needs a judge model"),
    "MME": Benchmark("mme", ("mme_perception_score", "mme_cognition_score"), 1.0),
    "MME perception": Benchmark("mme", ("mme_perception_score",), 1.0),
    "POPE": Benchmark(
        "pope",
        ("pope_f1_score",),
        protocol="F1 over all three parts together; LLaVA's script averages their F1",
    ),
    "SQA": Benchmark("scienceqa_img", ("exact_match",)),
    "VQAv2": Benchmark(
        "vqav2_val", ("exact_match",), protocol="validation split; papers send test-dev to a server"
    ),
    "TextVQA": Benchmark(
        "textvqa_val", ("exact_match",), protocol="no OCR tokens in the prompt; LLaVA's own script gives them"
    ),
    "VizWiz": Benchmark(
        "vizwiz_vqa_val", ("exact_match",), protocol="validation split; papers send test to a server"
    ),
    "SEED": Benchmark("seedbench", ("seed_image",), protocol="pictures only"),
    "MM-Vet": Benchmark("mmvet", ("gpt_eval_score",), 1.0, "depends on the judge model"),
    "MVBench": Benchmark("mvbench", ("mvbench_accuracy",), 1.0, "mean of its 20 tasks", parts=20),
    "EgoSchema": Benchmark(
        "egoschema_subset",
        ("score",),
        protocol="public subset of 500 questions; the papers' tables do not say which set they have",
    ),
    "LongVideoBench": Benchmark("longvideobench_val_v", ("lvb_acc",)),
    "Video-MME": Benchmark("videomme", ("videomme_perception_score",), 1.0, "without subtitles"),
    "MLVU": Benchmark("mlvu_dev", ("mlvu_percetion_score",), 1.0, "mean over its kinds of questions"),
    "NExT-QA": Benchmark("nextqa_mc_test", ("exact_match",)),
}
# Part of a checkpoint's name, in small letters, and the name that papers have for it.
CHECKPOINTS = {"llava-1.5-7b": "LLaVA-1.5-7B", "llava-onevision-qwen2-7b": "LLaVA-OneVision-7B"}


@dataclass(frozen=True)
class Figure:
    """A row of a published table.

    Attributes:
        model: as papers call it.
        tokens: "192", "25 %", or "all".
        method: as papers call it.
        key: ours; None where we have none.
        variant: "cite": as most papers copy it; "re-run": by the source, not by the method's authors; and so on.
        sources: keys of `Published.sources`.
        secondary: taken from another paper's table than the sources'.
        baseline: which dense row belongs to it; None where it is not known.
        values: benchmark -> value in the papers' unit.
        average: as the source has it.
        notes: benchmark -> what is special about it.
    """

    model: str
    tokens: str
    method: str
    sources: tuple[str, ...]
    values: dict[str, float]
    key: str | None = None
    variant: str = ""
    secondary: bool = False
    baseline: str | None = None
    average: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Method and variant."""
        return f"{self.method} ({self.variant})" if self.variant else self.method


@dataclass(frozen=True)
class Published:
    """All of `published.yaml`.

    Attributes:
        sources: key -> where it stands.
        budgets: method -> what N tokens mean to its authors.
        figures: the rows.
    """

    sources: dict[str, str]
    budgets: dict[str, str]
    figures: tuple[Figure, ...]

    def dense(self, figure: Figure) -> Figure | None:
        """The dense row that belongs to a figure."""
        for one in self.figures:
            if one.key == DENSE and one.model == figure.model and one.baseline == figure.baseline is not None:
                return one
        return None


@cache
def load() -> Published:
    """Reads the figures."""
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    budgets = {name: meaning for meaning, names in found["budgets"].items() for name in names}
    rows = [Figure(**{**one, "sources": tuple(one["sources"])}) for one in found["figures"]]
    return Published(found["sources"], budgets, tuple(rows))


def models() -> list[str]:
    """Models with published figures, as papers call them."""
    return list(CHECKPOINTS.values())


@dataclass(frozen=True)
class Outcome:
    """A measured value: one metric of one task under one setting."""

    model: str
    method: str
    keep: int | float | None
    task: str
    metric: str
    value: float
    tokens_llm: float | None
    layer_average: float | None
    n: int
    limited: bool


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes of `results.jsonl` of `vtprune eval --task`, or of a results file of lmms-eval with model `vtprune`.

    Raises:
        EvaluationError: the file is neither.
    """
    if not path.is_file():
        raise EvaluationError(
            f"there is no file {path}; give results.jsonl of `vtprune eval --task ...`, or lmms-eval's *_results.json."
        )
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [_of_row(json.loads(line)) for line in text.splitlines()]
        return _of_lmms(json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} is neither results.jsonl of `vtprune eval --task ...` nor a results file of lmms-eval with model "
            f"'vtprune' ({type(error).__name__}: {error})."
        ) from error


def _of_row(row: Mapping[str, Any]) -> Outcome:
    return Outcome(
        model=row["model"],
        method=row["method"],
        keep=row["keep"],
        task=row["task"],
        metric=row["metric"],
        value=row["accuracy"],
        tokens_llm=row["mean_tokens_llm"],
        layer_average=row["mean_layer_average"],
        n=row["n"],
        limited=row["limit"] is not None,
    )


def _of_lmms(found: Mapping[str, Any]) -> list[Outcome]:
    from .arguments import parse

    config = found["config"]
    arguments = config["model_args"]
    given = (
        dict(arguments)
        if isinstance(arguments, dict)
        else dict(part.split("=", 1) for part in arguments.split(",") if part)
    )
    if "keep" in given:
        given["keep"] = float(given["keep"]) if "." in str(given["keep"]) else int(given["keep"])
    plan, setting = parse({key: value for key, value in given.items() if key != "batch_size"})
    seen = found.get("throughput", {})
    out = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith(("_stderr", "_stderr_clt")) and isinstance(value, (int, float)):
                size = found.get("n-samples", {}).get(task, {})
                out.append(
                    Outcome(
                        model=plan.pretrained,
                        method=setting.method,
                        keep=setting.keep,
                        task=task,
                        metric=metric,
                        value=float(value),
                        tokens_llm=seen.get("avg_visual_tokens_llm"),
                        layer_average=seen.get("avg_layer_average_tokens"),
                        n=int(size.get("effective", 0)),
                        limited=config.get("limit") not in (None, -1),
                    )
                )
    return out


def model_of(outcomes: Sequence[Outcome], path: Path) -> str:
    """The papers' name of the model of a results file.

    Raises:
        EvaluationError: it is none of theirs.
    """
    names = sorted({outcome.model for outcome in outcomes})
    for name in names:
        for part, model in CHECKPOINTS.items():
            if part in name.lower():
                return model
    raise EvaluationError(
        f"{path} is of {', '.join(names) or 'no model'}, for which no figures are published here; if it is one of "
        f"{', '.join(models())} under another name, say so with --model."
    )


@dataclass(frozen=True)
class Line:
    """One benchmark of one measured setting beside one published row.

    Attributes:
        benchmark: as papers call it.
        figure: the published row.
        measured, published: in the papers' unit.
        kept, kept_published: of the dense model's value, each of its own; None where that is not known.
        setting: the measured method and budget.
    """

    benchmark: str
    figure: Figure
    setting: str
    measured: float
    published: float
    kept: float | None
    kept_published: float | None


@dataclass
class Compared:
    """Lines, and what a reader of them must know."""

    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)
    benchmarks: set[str] = field(default_factory=set)

    def reason(self) -> str:
        """Why there are no lines."""
        if not self.benchmarks:
            return f"no benchmark of {', '.join(sorted(b.task for b in BENCHMARKS.values()))} is in it."
        return (
            f"it has {', '.join(sorted(self.benchmarks))} under {', '.join(sorted(self.methods))}, and no figure has the "
            "same method, budget and benchmark. `vtprune published` shows all."
        )


def compare(
    published: Published,
    outcomes: Sequence[Outcome],
    model: str,
    methods: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
) -> Compared:
    """Every outcome beside every published row of the same method and budget.

    A ratio of 576 tokens and the number it comes to are the same budget.

    Args:
        published: from :func:`load`.
        outcomes: of one model.
        model: as papers call it.
        methods: our keys, to show only those.
        tokens: budgets as papers have them, to show only those.
    """
    settings: dict[tuple[str, int | float | None], list[Outcome]] = {}
    for one in outcomes:
        settings.setdefault((one.method, one.keep), []).append(one)
    dense = {name: _value(settings.get((DENSE, None), []), b) for name, b in BENCHMARKS.items()}
    out = Compared()
    budgets: set[str] = set()
    for (method, keep), mine in settings.items():
        out.methods.add(method)
        for figure in published.figures:
            if figure.model != model or figure.key != method or not _same_budget(figure.tokens, keep):
                continue
            if (methods and method not in methods) or (tokens and figure.tokens not in tokens):
                continue
            base = published.dense(figure)
            for name, theirs in figure.values.items():
                value = _value(mine, BENCHMARKS[name])
                if value is None:
                    continue
                whole, their_whole = dense[name], base.values.get(name) if base is not None else None
                out.lines.append(
                    Line(
                        name,
                        figure,
                        method if keep is None else f"{method} {keep}",
                        value,
                        theirs,
                        value / whole if whole else None,
                        theirs / their_whole if their_whole else None,
                    )
                )
                if figure.method in published.budgets and method != DENSE:
                    budgets.add(f"{figure.method}: {published.budgets[figure.method]}")
                if name in figure.notes:
                    budgets.add(f"{figure.title} on {name}: {figure.notes[name]}")
        out.benchmarks |= {name for name, b in BENCHMARKS.items() if _value(mine, b) is not None}
    out.lines.sort(key=lambda line: list(BENCHMARKS).index(line.benchmark))
    shown = dict.fromkeys(line.benchmark for line in out.lines)
    if any(one.limited for one in outcomes):
        out.notes.append(
            "WARNING: only some of the questions were asked (--limit); these are not the benchmarks."
        )
    out.notes += [
        f"protocol, {name}: {BENCHMARKS[name].protocol}" for name in shown if BENCHMARKS[name].protocol
    ]
    out.notes += [f"tokens, {text}" for text in sorted(budgets)]
    spent = {
        f"{one.method} {one.keep}: {one.tokens_llm:.1f} tokens enter the language model, {one.layer_average:.1f} on average "
        "over its layers"
        for one in outcomes
        if one.keep is not None and one.tokens_llm is not None and one.layer_average is not None
    }
    out.notes += [f"measured, {text}" for text in sorted(spent)]
    out.notes += _source_notes(published, [line.figure for line in out.lines])
    return out


def _same_budget(tokens: str, keep: int | float | None) -> bool:
    if tokens == "all" or keep is None:
        return tokens == "all" and keep is None
    if tokens.endswith("%"):
        return isinstance(keep, float) and abs(100 * keep - float(tokens[:-1])) < 0.5
    return keep == int(tokens) if isinstance(keep, int) else abs(576 * keep - int(tokens)) < 1


def _value(outcomes: Sequence[Outcome], benchmark: Benchmark) -> float | None:
    """In the papers' unit; None where something is missing."""
    if benchmark.parts:
        parts = [
            one.value
            for one in outcomes
            if one.task.startswith(f"{benchmark.task}_") and one.metric == benchmark.metrics[0]
        ]
        return benchmark.scale * sum(parts) / len(parts) if len(parts) == benchmark.parts else None
    total = 0.0
    for metric in benchmark.metrics:
        found = [one.value for one in outcomes if one.task == benchmark.task and one.metric == metric]
        if not found:
            return None
        total += found[0]
    return benchmark.scale * total


def _source_notes(published: Published, figures: Sequence[Figure]) -> list[str]:
    keys = dict.fromkeys(key for figure in figures for key in figure.sources)
    notes = [f"source, {key}: {published.sources[key]}" for key in keys]
    if any(figure.variant.startswith("cite") for figure in figures):
        notes.append("cite: as most papers copy it; re-run: by the source, not by the method's authors")
    if any(figure.secondary for figure in figures):
        notes.append("*: not from the method's or the source's own table, but cited there")
    return notes


def choose(
    published: Published,
    model: str,
    methods: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
) -> list[Figure]:
    """The published rows of a model, of some methods and budgets only if any are given.

    Raises:
        EvaluationError: nothing is left.
    """
    rows = [
        f
        for f in published.figures
        if f.model == model
        and (not methods or f.key in methods or f.method in methods)
        and (not tokens or f.tokens in tokens)
    ]
    if rows:
        return rows
    mine = [f for f in published.figures if f.model == model]
    raise EvaluationError(
        f"no figures of {model} for this choice; methods: {', '.join(sorted({f.key for f in mine if f.key}))}; tokens: "
        f"{', '.join(dict.fromkeys(f.tokens for f in mine))}."
    )


def figures_notes(published: Published, figures: Sequence[Figure]) -> list[str]:
    """What a reader of :func:`figures_tables` must know."""
    meanings: dict[str, list[str]] = {}
    for method in dict.fromkeys(f.method for f in figures if f.method in published.budgets):
        meanings.setdefault(published.budgets[method], []).append(method)
    return [
        "Nothing here was measured by vtprune. Compare retained accuracy rather than absolute figures across sources.",
        *(f"{', '.join(names)}: {meaning}" for meaning, names in meanings.items()),
        *_source_notes(published, figures),
    ]


def figures_tables(figures: Sequence[Figure]) -> list[Table]:
    """Published rows of one model, one table per budget."""
    columns = [name for name in BENCHMARKS if any(name in f.values for f in figures)]
    out = []
    for budget in dict.fromkeys(f.tokens for f in figures):
        table = Table(title=f"Published: {figures[0].model}, tokens: {budget}")
        table.add_column("method", no_wrap=True)
        for name in (*columns, "average"):
            table.add_column(name, justify="right")
        table.add_column("source")
        for f in figures:
            if f.tokens == budget:
                table.add_row(
                    f.title,
                    *(str(f.values[name]) if name in f.values else NONE for name in columns),
                    f.average or NONE,
                    ", ".join(f.sources) + ("*" if f.secondary else ""),
                )
        out.append(table)
    return out


def comparison_table(compared: Compared) -> Table:
    """Measured beside published."""
    table = Table(
        title="Measured beside published, in the papers' units; retained: of each one's own dense model"
    )
    for name in ("benchmark", "measured as", "published as"):
        table.add_column(name, no_wrap=True)
    for name in ("measured", "published", "difference", "retained", "published", "difference"):
        table.add_column(name, justify="right")
    table.add_column("source")
    before = None
    for line in compared.lines:
        if before not in (None, line.benchmark):
            table.add_section()
        shown = "" if before == line.benchmark else line.benchmark
        before = line.benchmark
        table.add_row(
            shown,
            line.setting,
            f"{line.figure.title} {line.figure.tokens}",
            number(line.measured),
            str(line.published),
            f"{line.measured - line.published:+.1f}",
            NONE if line.kept is None else f"{100 * line.kept:.1f}",
            NONE if line.kept_published is None else f"{100 * line.kept_published:.1f}",
            NONE
            if line.kept is None or line.kept_published is None
            else f"{100 * (line.kept - line.kept_published):+.1f}",
            ", ".join(line.figure.sources) + ("*" if line.figure.secondary else ""),
        )
    return table

"""The support matrix: every method on every family, computed from the registry and the tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import nn

from vtprune import methods
from vtprune.integrations import FAMILIES, Family
from vtprune.integrations import integrate as describe
from vtprune.method import SITE_KINDS, ModelFacts
from vtprune.planning import Support, support
from vtprune.testing.zoo import ENCODERS, LVLMS


def family_of(model: nn.Module) -> Family:
    """The family that supports a model."""
    return next(f for f in FAMILIES if f.matches(model))


@cache
def facts_of(name: str) -> tuple[Family, str, ModelFacts]:
    """Family, class name and facts of the zoo's tiny model `name`."""
    model = (LVLMS | ENCODERS)[name].build()
    return family_of(model), type(model).__name__, describe(model).facts


def cells(name: str) -> dict[str, Support]:
    """Method key -> whether it runs on the zoo's tiny model `name`."""
    return {key: support(cls, facts_of(name)[2]) for key, cls in methods.REGISTRY.items()}


def markdown() -> str:
    """The matrix as two Markdown tables, those of docs/models.md."""
    return "\n".join(_lines()).strip()


def summary() -> str:
    """Models, where tokens can leave, and how many methods run, as the Markdown table of README."""
    lines = [
        f"| model | class | where tokens can leave | methods, of {len(methods.REGISTRY)} | of them with an option | tested as |",
        "|---|---|---|--:|--:|---|",
    ]
    for name in (*LVLMS, *ENCODERS):
        family, cls, facts = facts_of(name)
        running = [cell for cell in cells(name).values() if cell.works]
        with_option = sum(bool(cell.options) for cell in running)
        sites = ", ".join(site for site in SITE_KINDS if site in facts.sites)
        lines.append(f"| {family.title} | `{cls}` | {sites} | {len(running)} | {with_option} | `{name}` |")
    return "\n".join(lines)


def _lines() -> Iterator[str]:
    keys = sorted(methods.REGISTRY)
    for title, zoo in (("vision-language model", LVLMS), ("encoder alone", ENCODERS)):
        yield f"| {title} | class | sites | {' | '.join(f'`{k}`' for k in keys)} | tested as |"
        yield f"|---|---|---|{':-:|' * len(keys)}---|"
        for name in zoo:
            family, cls, facts = facts_of(name)
            sites = ", ".join(s for s in SITE_KINDS if s in facts.sites)
            row = [_mark(cell) for _, cell in sorted(cells(name).items())]
            yield f"| {family.title} | `{cls}` | {sites} | {' | '.join(row)} | `{name}` |"
        yield ""


def _mark(cell: Support) -> str:
    if not cell.works:
        return "no"
    return ", ".join(f"{k}={v}" for k, v in cell.options.items()) or ("training" if cell.training else "yes")

"""Why some methods are not above `random` at 16 of 144 tokens: experiments that change one thing each.

    python -m vtprune.eval.explanations [--method NAME ...] [--limit N] [--output FILE]

An experiment states a hypothesis about what costs a method accuracy, takes exactly that away, and asks the same questions
of split `val` again. The hypothesis survives if the change helps beyond chance. `docs/why-below-random.md` tells what
was found.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn

import vtprune
from vtprune import methods
from vtprune.errors import VTPruneError
from vtprune.method import Method, ModelFacts, Signal, SignalKind, Stage, View
from vtprune.methods.as_vit import weighted
from vtprune.methods.mstm import mergence
from vtprune.methods.prumerge import reduce
from vtprune.patch import Patch
from vtprune.scoring import geometric
from vtprune.selecting import widened
from vtprune.selection import Selection, topk

from .accuracy import Batch, Outcome, ask, make_batches
from .evaluation import BATCH_SIZE
from .paired import paired
from .prompts import Prompter, load_model
from .results import JsonLines, device_name, mean_and_stderr, versions
from .settings import DRAWS, Setting
from .world import Example, examples, reference_dir
from .world.models import PATCH

KEEP = 16
SPLIT, SEED = "val", 0
LIMIT = 120
ALPHA = 0.001  # some fifty hypotheses are tested
RANDOM = "random"


@dataclass(frozen=True)
class Experiment:
    """One run: a method, or a variant that differs from another run in one thing.

    Attributes:
        name: of the run; unique.
        method: the method that it is about.
        variants: what runs, once per entry (several draws of `random`).
        against: name of the run that it is compared with; None for a method as it is.
        hypothesis: what is claimed about the run that it is compared with.
        change: the one thing that is different.
        expects: what follows from the hypothesis: "higher" accuracy, or the "same" score of every question.
    """

    name: str
    method: str
    variants: tuple[Method, ...]
    against: str | None = None
    hypothesis: str = ""
    change: str = ""
    expects: Literal["higher", "same"] = "higher"


@dataclass(frozen=True)
class Variant(Setting):
    """A setting that runs method objects instead of a name with options."""

    variants: tuple[Method, ...] = field(default=(), hash=False)

    @property
    def runs(self) -> int:
        return len(self.variants)

    @contextmanager
    def applied(self, model: nn.Module, run: int = 0) -> Iterator[Patch | None]:
        with vtprune.patch(model, self.variants[run]) as patch:
            yield patch


# ---------------------------------------------------------------------- variants that no option makes


def changed(method: Method, **members: object) -> Method:
    """The same options in a subclass with other members."""
    cls: Any = type(f"Changed{type(method).__name__}", (type(method),), members)
    made: Method = cls(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
    return made


def uniform(view: View) -> Tensor:
    """Scores [G, N] that say nothing; a token has the same one in every stage."""
    rows = []
    for index, n, seed in zip(view.index, view.n_original, view.image_seeds, strict=True):
        generator = torch.Generator().manual_seed(crc32(str(seed).encode()))
        rows.append(torch.rand(n, generator=generator)[index])
    return torch.stack(rows)


def draw(self: Method, view: View) -> Selection:
    """Decides by nothing."""
    return Selection.topk(uniform(view), view.k)


def by_text(self: Method, view: View) -> Selection:
    """Decides by the attention of all tokens of the prompt, summed over the declared layers."""
    layers = [widened(view[s]).sum((1, 2)) for s in view.signals if s.kind == "prompt_attention"]
    return Selection.topk(torch.stack(layers).sum(0), view.k)


def per_query(self: Method, view: View) -> Selection:
    """SpAtten's sum over queries as a mean over those that see the token: later tokens of the picture, and the text.

    Right in front of the first removal only, while all tokens of the picture are there.
    """
    *received, text = view.signals
    total = torch.stack([widened(view[s]).sum(1) for s in received]).sum(0)
    asking = (view[text].sum((1, 3)) > 0).sum(-1, keepdim=True)
    return Selection.topk(total / (view.n - view.index + asking), view.k)


def best_weighted(self: Any, view: View) -> Selection:
    """STELLA's importance without its draw."""
    (attention,) = (view[signal].float() for signal in view.signals)
    real = attention.sum(-1, keepdim=True) > 0
    sharp = (attention.log() / self.temperature).softmax(-1).where(real, 0)
    return Selection.topk(sharp.mean((1, 2)), view.k)


def all_text_rates(self: Any, view: View) -> Selection:
    """SparseVLM with every token of the prompt as a rater."""
    ranked: Selection = self._recycled(view, topk(widened(view[view.signals[0]]).mean((1, 2)), view.n))
    return ranked


def recycles_draw(self: Any, view: View) -> Selection:
    """SparseVLM's clusters around tokens chosen by nothing."""
    ranked: Selection = self._recycled(view, topk(uniform(view), view.n))
    return ranked


def cross_only(self: Method, view: View) -> Selection:
    """ATP-LLaVA by s_cross alone."""
    return Selection.topk(widened(view[view.signals[-1]]).mean((1, 2)), view.k)


def prumerge(
    scale: float = 1.0, rest: bool = True, order: Callable[[View], Tensor] | None = None
) -> Callable[[Any, View], Selection]:
    """PruMerge with scaled coefficients (0: nothing is merged), without the rest token, or choosing by another score."""

    def decide(self: Any, view: View) -> Selection:
        scores, keys = self.attention(view)
        ranked = topk(scores if order is None else order(view), view.n)
        chosen = self.select(ranked, None, view.k + (not rest))
        return reduce(scale * scores, keys, chosen, rest) if scale else Selection.of(chosen)

    return decide


def summed(view: View) -> Tensor:
    """[CLS] attention [G, N] summed over the declared layers, as VTC-CLS."""
    layers = [view[s].mean(1) for s in view.signals if s.kind == "cls_attention"]
    return torch.stack(layers).sum(0)


def first_three(self: Any, view: View) -> tuple[Tensor, Tensor]:
    """PruMerge's score where further signals are declared behind its own."""
    own = View(
        view.features,
        view.index,
        view.layout,
        view.k,
        view.n_original,
        lambda: view.image_seeds,
        {signal: view[signal] for signal in view.signals[:3]},
    )
    both: tuple[Tensor, Tensor] = methods.PruMerge.attention(self, own)
    return both


def summed_needs(self: Any, facts: ModelFacts) -> tuple[Signal, ...]:
    """PruMerge's signals and VTC-CLS's."""
    sums = methods.VTCCls(keep=KEEP).needs(facts)
    return (*methods.PruMerge.needs(self, facts), *sums)


def inside_by(scores: Callable[[Any, View], Tensor], merge: bool) -> Callable[[Any, View], Selection]:
    """A decision of MSTM by other scores, with or without merging."""

    def decide(self: Any, view: View) -> Selection:
        if not merge:
            return Selection.topk(scores(self, view), view.k)
        return mergence(scores(self, view), view.features, view.k)

    return decide


def cls_mean(self: Any, view: View) -> Tensor:
    """MSTM's score."""
    return view[view.signals[0]].float().mean(1)


def behind(method: Method) -> Method:
    """The same scores of the same ViT layers and the same counts, but everything leaves behind the encoder."""

    def stages(self: Any, facts: ModelFacts) -> list[Stage]:
        needs = [stage.needs for stage in type(method).stages(method, facts)]

        def decide(view: View) -> Selection:
            left = torch.arange(view.n).expand(len(view.index), -1)
            for i, signals in enumerate(needs, start=1):
                values = [view[signal].float() for signal in signals]
                scores = weighted(*values) if len(values) == 2 else values[0].mean(1)
                count = geometric(view.n, view.k, i, len(needs))
                left = left.gather(1, topk(scores.gather(1, left), count).sort(-1).values)
            return Selection.of(left)

        return [Stage(facts.behind_encoder(), KEEP, decide, tuple(s for group in needs for s in group))]

    return changed(method, stages=stages)


def reads(layer: int, kind: SignalKind = "text_attention") -> Callable[[Any, ModelFacts], tuple[Signal, ...]]:
    """`needs` of a method with one stage that reads another layer or kind of attention."""
    return lambda self, facts: (Signal(kind, layer),)


def received_and_text(self: Any, layer: int, since: int) -> tuple[Signal, ...]:
    """SpAtten's signals, and the layer before's attention of the text to count its tokens."""
    return (
        *(Signal("decoder_received", read) for read in range(layer)),
        Signal("prompt_attention", layer - 1),
    )


def text_since(self: Any, layer: int, since: int) -> tuple[Signal, ...]:
    """The text's attention of all layers since the last removal."""
    return tuple(Signal("prompt_attention", read) for read in range(since, layer))


# ---------------------------------------------------------------------- experiments


class About:
    """Collects the experiments about one method.

    Attributes:
        found: the method as it is, then what was added.
    """

    def __init__(self, method: str, **options: object) -> None:
        self.method = method
        self.base = methods.create(method, keep=KEEP, **options)
        self.found = [Experiment(method, method, (self.base,))]

    def option(self, hypothesis: str, against: str = "", same: bool = False, **options: object) -> Method:
        """A change that users can make; `against` names the options of the run that it is compared with."""
        change = ", ".join(f"{name}={value}" for name, value in options.items())
        earlier = next(e for e in self.found if e.name == self._name(against))
        before: Any = earlier.variants[0]
        variant: Method = dataclasses.replace(before, **options)
        self._add(hypothesis, change, variant, against, same)
        return variant

    def variant(self, hypothesis: str, change: str, variant: Method, against: str = "") -> None:
        """A change that no option makes."""
        self._add(hypothesis, change, variant, against, False)

    def _add(self, hypothesis: str, change: str, variant: Method, against: str, same: bool) -> None:
        name = self._name(f"{against}; {change}" if against else change)
        expects: Literal["higher", "same"] = "same" if same else "higher"
        self.found.append(
            Experiment(
                name,
                self.method,
                (variant,),
                self._name(against),
                hypothesis,
                change,
                expects,
            )
        )

    def _name(self, change: str) -> str:
        return f"{self.method}: {change}" if change else self.method


FEW = "a layer average of 16 is out of reach behind full layers, so one token is left behind every stage"
POSITIONS = "the positions that survivors are given cost it"
WORSE = "its score is worse than none"


def experiments() -> list[Experiment]:
    """All of them; the runs that are compared with come first."""
    draws = tuple(methods.Random(keep=KEEP, seed=seed) for seed in range(DRAWS))
    return [
        Experiment(RANDOM, RANDOM, draws),
        *_fastv(),
        *_stella(),
        *_prumerge("prumerge"),
        *_prumerge("prumerge-plus"),
        *_vflowopt(),
        *_mstm(),
        *_as_vit(),
        *_sparsevlm(),
        *_pyramiddrop(),
        *_spatten(),
        *_atp_llava(),
    ]


def _fastv() -> list[Experiment]:
    it = About("fastv")
    late = methods.FastV(keep=KEEP, layer=3)
    it.option(POSITIONS, positions="dense")
    it.variant(WORSE, "uniform scores", changed(it.base, decide=draw))
    it.variant(
        "the last prompt token knows what is asked for one layer later",
        "attention of layer 2, at the same place",
        changed(it.base, needs=reads(2)),
    )
    it.variant(
        "other tokens of the prompt know what is asked for in layer 2",
        "attention of the whole prompt in layer 2, at the same place",
        changed(it.base, needs=reads(2, "prompt_attention"), decide=by_text),
    )
    it.variant(
        "tokens leave before layer 2 looks up the thing that the question names",
        "the same scores of layer 1, but tokens leave in front of layer 3",
        changed(late, needs=reads(1)),
    )
    it.variant(
        "without any score, too, tokens leave before the look-up",
        "tokens leave in front of layer 3",
        changed(late, decide=draw),
        against="uniform scores",
    )
    it.option("a layer later nothing is lost", layer=3)
    return it.found


def _stella() -> list[Experiment]:
    it = About("stella")
    it.variant(
        "the draw costs it", "the best tokens instead of a draw", changed(it.base, decide=best_weighted)
    )
    it.option("the temperature is too low", temperature=1.0)
    it.variant(WORSE, "uniform scores", changed(it.base, decide=draw))
    it.variant(
        "the prompt knows what is asked for one layer later",
        "attention of layer 2, at the same place",
        changed(it.base, needs=reads(2, "prompt_attention")),
    )
    it.variant(
        "tokens leave before layer 2 looks up the thing that the question names",
        "the same scores of layer 1, but tokens leave in front of layer 3",
        changed(methods.create("stella", keep=KEEP, layer=3), needs=reads(1, "prompt_attention")),
    )
    it.option("a layer later nothing is lost", layer=3)
    return it.found


def _prumerge(name: str) -> list[Experiment]:
    it = About(name)
    it.option(POSITIONS, positions="original")
    it.variant("the rest token costs it", "one more selected token instead", _merging(it.base, rest=False))
    it.variant("merging costs it", "nothing is merged", _merging(it.base, scale=0.0, rest=False))
    it.variant(
        "coefficients are too large, since attention is shared by 145 keys instead of 577",
        "coefficients times 145 / 577",
        _merging(it.base, scale=145 / 577),
    )
    it.variant(WORSE, "uniform scores", _merging(it.base, order=uniform))
    it.variant(
        "the last layer's attention alone is a poor score",
        "selected by the attention summed over layers, merged as before",
        changed(it.base, decide=prumerge(order=summed), needs=summed_needs, attention=first_three),
    )
    return it.found


def _merging(method: Method, **options: Any) -> Method:
    return changed(method, decide=prumerge(**options))


def _vflowopt() -> list[Experiment]:
    it = About("vflowopt")
    it.option("no query exceeds t = 34.76 times the mean, so that one query votes alone", same=True, t=1e9)
    it.option("one query is too few", t=0.0)
    it.option(
        "a cell of 15.58 is the whole grid, so that one token stands for all that is pruned",
        same=True,
        a=1000.0,
    )
    it.option("one recycled token is too few", a=4.0)
    it.option("too few queries vote, also where more is recycled", against="a=4.0", t=0.0)
    it.option("the last layer's attention is a poor score", attention_layer=-2)
    it.option(
        "the last layer's attention is a poor score, also where all queries vote",
        against="t=0.0",
        attention_layer=-2,
    )
    it.option("the second and third stage cost it", r1=1.0, r2=1.0)
    return it.found


def _mstm() -> list[Experiment]:
    it = About("mstm")
    plain = it.base
    it.variant("merging costs it", "nothing is merged", changed(plain, decide=inside_by(cls_mean, False)))
    it.variant(
        "[CLS] attention of early layers is worse than none",
        "uniform scores",
        changed(plain, decide=inside_by(lambda self, view: uniform(view), True)),
    )
    it.variant(
        "the tokens left lack what they would have got from the others in the layers behind",
        "the same scores, but tokens leave behind the encoder",
        behind(plain),
        against="nothing is merged",
    )
    it.option("it acts too early", layers=(4,))
    return it.found


def _as_vit() -> list[Experiment]:
    it = About("as-vit", threshold="topk")
    it.variant(WORSE, "uniform scores", changed(it.base, decide=draw))
    it.variant(
        "the tokens left lack what they would have got from the others in the layers behind",
        "the same scores, but tokens leave behind the encoder",
        behind(it.base),
    )
    return it.found


def _sparsevlm() -> list[Experiment]:
    it = About("sparsevlm")
    few = "counts=(16, 16, 16)"
    base = it.option(FEW, counts=(16, 16, 16))
    it.option(
        "`keep` is an average over all layers here; it has more in the authors' setting of 64 of 576",
        counts=(0.115, 0.052, 0.03),
    )
    it.option(POSITIONS, against=few, positions="original")
    it.option("recycling costs it", against=few, recycle=0.0)
    it.variant(
        "raters chosen from the text cost it",
        "all text rates",
        changed(base, decide=all_text_rates),
        against=few,
    )
    it.variant(WORSE, "uniform scores", changed(base, decide=recycles_draw), against=few)
    it.option("tokens leave before layer 2 looks things up", against=few, layers=(2, 4, 5))
    return it.found


def _pyramiddrop() -> list[Experiment]:
    it = About("pyramiddrop")
    few = "counts=(16, 16, 16)"
    base = it.option(FEW, counts=(16, 16, 16))
    it.variant(WORSE, "uniform scores", changed(it.base, decide=draw))
    it.option(POSITIONS, against=few, positions="original")
    it.variant(WORSE, "uniform scores", changed(base, decide=draw), against=few)
    it.option("tokens leave before layer 2 looks things up", against=few, layers=(3, 5, 6))
    it.option("tokens leave before layer 2 looks things up, also with one token left", layers=(3, 5, 6))
    return it.found


def _spatten() -> list[Experiment]:
    it = About("spatten")
    few = "layers=(2, 3, 4, 5, 6, 7), counts=(16, 16, 16, 16, 16, 16)"
    base = it.option(FEW, layers=(2, 3, 4, 5, 6, 7), counts=(16,) * 6)
    it.variant(WORSE, "uniform scores", changed(base, decide=draw), against=few)
    it.variant(
        "a sum over queries favours early tokens, which more queries see",
        "the mean over the queries that see a token",
        changed(base, signals=received_and_text, decide=per_query),
        against=few,
    )
    it.variant(
        "most queries are the picture's own tokens",
        "attention of the prompt's tokens only",
        changed(base, signals=text_since, decide=by_text),
        against=few,
    )
    it.option(
        "tokens leave before layer 2 looks things up", against=few, layers=(3, 4, 5, 6, 7), counts=(16,) * 5
    )
    return it.found


def _atp_llava() -> list[Experiment]:
    it = About("atp-llava", threshold="quantile")
    few = "counts=(16, 16, 16)"
    base = it.option(FEW, counts=(16, 16, 16))
    it.variant(WORSE, "uniform scores", changed(base, decide=draw), against=few)
    it.option("the evenly sampled tokens cost it", against=few, strength=1000.0)
    it.variant(
        "how the picture's tokens attend to each other is a poor score",
        "attention of the prompt's tokens only",
        changed(base, decide=cross_only),
        against=few,
    )
    it.option("tokens leave before layer 2 looks things up", against=few, layers=(2, 4, 6))
    return it.found


# ---------------------------------------------------------------------- running


@dataclass(frozen=True)
class Bench:
    """A model and its questions.

    Attributes:
        model: unpatched.
        prompter: made for it.
        questions: what is asked.
        batches: the same questions.
    """

    model: nn.Module
    prompter: Prompter
    questions: Sequence[Example]
    batches: Sequence[Batch]

    @classmethod
    def open(cls, limit: int) -> Bench:
        """The reference model with `limit` questions of every kind of split `val`."""
        model, processor = load_model(str(reference_dir()), "cpu", "auto")
        prompter = Prompter(model, processor)
        questions = examples(SPLIT, limit, SEED)
        return cls(model, prompter, questions, make_batches(prompter, questions, BATCH_SIZE))

    def run(self, one: Experiment) -> Outcome:
        """Answers and kept tokens of all questions."""
        setting = Variant(one.method, variants=one.variants)
        everything = range(len(self.questions))
        (outcome,) = ask(self.model, self.prompter, self.questions, self.batches, [setting], everything)
        if isinstance(outcome, VTPruneError):
            raise outcome
        return outcome

    @torch.no_grad()
    def layer_average(self, one: Experiment) -> float:
        """Visual tokens averaged over decoder layers, for the first question."""
        image = self.prompter.inputs([self.questions[0].image], [self.questions[0].question])
        with vtprune.patch(self.model, one.variants[0]) as patch:
            self.model(**image)
            return patch.report().layer_average_tokens[0]

    def shown(self, outcome: Outcome) -> float:
        """Mean share of the boxes with the answer on which the middle of a kept token lies, where there is an answer."""
        shares = []
        for number, kept in outcome.kept.items():
            boxes = self.questions[number].boxes
            middles = [((i % kept.cols + 0.5) * PATCH, (i // kept.cols + 0.5) * PATCH) for i in kept.index]
            hit = [any(x0 <= x < x1 and y0 <= y < y1 for x, y in middles) for x0, y0, x1, y1 in boxes]
            shares += [sum(hit) / len(hit)] if hit else []
        return mean_and_stderr(shares)[0]


def row(
    one: Experiment, scores: Sequence[float], before: Sequence[float] | None, chance: Sequence[float]
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        one: what was run.
        scores: of every question.
        before: those of the run that it is compared with.
        chance: those of `random`.
    """
    accuracy, stderr = mean_and_stderr(scores)
    figures: dict[str, Any] = {"accuracy": accuracy, "stderr": stderr}
    over = paired(scores, chance)
    figures |= {"over_random": over.difference, "over_random_stderr": over.stderr, "over_random_p": over.p}
    if before is None:
        return figures
    test = paired(scores, before)
    survives = (
        test.difference > 0 and test.p < ALPHA if one.expects == "higher" else list(scores) == list(before)
    )
    return figures | {
        "difference": test.difference,
        "difference_stderr": test.stderr,
        "p": test.p,
        "test": test.test,
        "survives": survives,
    }


def explain(bench: Bench, chosen: Sequence[Experiment], on_row: Callable[[dict[str, Any]], None]) -> None:
    """Runs experiments and hands on a row for each; `random` and what a run is compared with have to come first."""
    scores: dict[str, list[float]] = {}
    for one in chosen:
        outcome = bench.run(one)
        if outcome.errors:
            raise vtprune.VTPruneError(f"{one.name}: {next(iter(outcome.errors.values()))}")
        scores[one.name] = outcome.correct
        kinds: dict[str, list[float]] = {}
        for question, score in zip(bench.questions, outcome.correct, strict=True):
            kinds.setdefault(question.kind, []).append(score)
        defaults = methods.method_class(one.method)
        default: dict[str, object] = {f.name: f.default for f in dataclasses.fields(defaults)}
        options = {k: v for k, v in dataclasses.asdict(one.variants[0]).items() if v != default[k]}
        if len(one.variants) > 1:
            options["seed"] = list(range(len(one.variants)))
        on_row(
            {
                "method": one.method,
                "name": one.name,
                "against": one.against,
                "hypothesis": one.hypothesis,
                "change": one.change,
                "options": options,
                "by_options": type(one.variants[0]) is defaults,
                "split": SPLIT,
                "n": len(outcome.correct),
                **row(one, outcome.correct, scores[one.against] if one.against else None, scores[RANDOM]),
                "kinds": {kind: mean_and_stderr(values)[0] for kind, values in kinds.items()},
                "answer_shown": bench.shown(outcome),
                "layer_average_tokens": bench.layer_average(one),
            }
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point: writes one JSON line per run and prints a summary of each."""
    every = experiments()
    about = list(dict.fromkeys(one.method for one in every if one.method != RANDOM))
    parser = argparse.ArgumentParser(
        prog="python -m vtprune.eval.explanations",
        description="Why some methods are not above `random` at 16 of 144 tokens.",
    )
    parser.add_argument(
        "--method", action="append", choices=about, help="only experiments about it; can be repeated"
    )
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help="questions of every kind (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="file for the rows; an old one is replaced")
    given = parser.parse_args(arguments)
    wanted = {RANDOM, *(given.method or about)}
    flags = "".join(f" --method {name}" for name in given.method or ())
    bench = Bench.open(given.limit)
    origin = {
        "command": f"{parser.prog}{flags} --limit {given.limit}",
        "versions": versions(),
        "device": device_name("cpu"),
    }
    if given.output is not None:
        given.output.write_text("")

    def write(figures: dict[str, Any]) -> None:
        if given.output is not None:
            JsonLines(given.output).add([figures | origin])
        print(summary(figures), flush=True)

    explain(bench, [one for one in every if one.method in wanted], write)


def summary(figures: dict[str, Any]) -> str:
    """One line of a row."""
    text = f"{100 * figures['accuracy']:5.1f}  {figures['name']}"
    if figures["against"]:
        verdict = "survives" if figures["survives"] else "rejected"
        difference, stderr = 100 * figures["difference"], 100 * (figures["difference_stderr"] or 0)
        text += (
            f"  {difference:+.1f} +- {stderr:.1f} (p {figures['p']:.2g}): {verdict}, {figures['hypothesis']}"
        )
    return text


if __name__ == "__main__":
    main()

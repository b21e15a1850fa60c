"""Breaks the engine on purpose, one way at a time, and shows that the tests catch every one.

    python tests/mutants.py            all mutants
    python tests/mutants.py NAME ...   some
    python tests/mutants.py --list

Each mutant replaces one piece of text in a temporary copy of the repository and runs the contract tests there until
the first failure. The exit status is 1 if a mutant survives, or if its text is no longer found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/test_ops.py",
    "tests/contract",
    "tests/dense",
    "tests/test_engine_edges.py",
    "tests/encoders",
    "tests/users",
    "tests/test_llava_original.py",
)


@dataclass(frozen=True)
class Mutant:
    """One deliberate fault.

    Attributes:
        name: what is broken.
        path: file, relative to the root.
        text: what stands there; must occur exactly once.
        fault: what is put instead.
    """

    name: str
    path: str
    text: str
    fault: str


DECODER, SEQUENCE = "vtprune/engine/decoder.py", "vtprune/engine/sequence.py"
SIGNALS, BYPASS = "vtprune/engine/decoder_signals.py", "vtprune/engine/bypass.py"
HEADS, TOWERS = "vtprune/engine/heads.py", "integrations/towers.py"
ENCODER = "vtprune/engine/encoder.py"
MUTANTS = (
    Mutant(
        "all heads in decoding",
        HEADS,
        "            if alive is not None:\n                heads",
        "            if alive is not None and run.images:\n                heads",
    ),
    Mutant(
        "heads of one row for all",
        HEADS,
        "        after[rows] &= chosen.keep\n",
        "        after &= chosen.keep[:1]\n",
    ),
    Mutant(
        "padding counts for heads",
        HEADS,
        "size if valid is None else size * valid.unsqueeze(-1).to(size.device)",
        "size",
    ),
    Mutant(
        "heads stay behind in a reordered cache",
        "vtprune/engine/cache.py",
        "{layer: change(alive) for layer",
        "{layer: alive for layer",
    ),
    Mutant(
        "separators count as text",
        "vtprune/engine/run.py",
        "            text &= ~self.placeholders[row]\n",
        "            for image in self.images:\n                if image.row == row:\n                    text[image.cols] = False\n",
    ),
    Mutant(
        "signals of bidirectional prompts as if causal",
        SIGNALS,
        "            if kind in run.ready:\n",
        "            if False:\n",
    ),
    Mutant(
        "carried signals at the wrong tokens",
        SIGNALS,
        "                full[image.alive] = rows\n",
        "                full[: len(rows)] = rows\n",
    ),
    Mutant(
        "pixels of the transposed grid",
        TOWERS,
        "parts.permute(0, 2, 4, 1, 3, 5)",
        "parts.permute(0, 4, 2, 1, 3, 5)",
    ),
    Mutant(
        "off by one in kept indices",
        SEQUENCE,
        "        self.alive.index_put_(places, gone)\n",
        "        self.alive.index_put_((places[0], (places[1] + 1).clamp(max=self.length - 1)), gone)\n",
    ),
    Mutant(
        "wrong padding side",
        SEQUENCE,
        "col, valid = ops.compact(self.alive, n_slots, self.left)",
        "col, valid = ops.compact(self.alive, n_slots, not self.left)",
    ),
    Mutant(
        "unsorted indices",
        "vtprune/selection.py",
        "return cls(tuple(index.sort(-1).values.unbind(0)))",
        "return cls(tuple(index.unbind(0)))",
    ),
    Mutant(
        "positions renumbered although original was asked for",
        SEQUENCE,
        "        if renumber:\n",
        "        if True:\n",
    ),
    Mutant(
        "positions kept although dense was asked for",
        SEQUENCE,
        "            positions = positions - self.renumbered.cumsum(1)\n",
        "            positions = positions - 0 * self.renumbered.cumsum(1)\n",
    ),
    Mutant(
        "shift of dense positions forgotten in decoding",
        SEQUENCE,
        "        shift = past.shift if past is not None else None\n",
        "        shift = None\n",
    ),
    Mutant(
        "padding mask not carried into decoding",
        SEQUENCE,
        "        before = past.valid if past is not None else None\n",
        "        before = None\n",
    ),
    Mutant(
        "mask not replaced behind a decoder stage",
        DECODER,
        'kwargs = {**kwargs, "attention_mask": self._mask(run, segment, layer, hidden)}',
        "kwargs = dict(kwargs)",
    ),
    Mutant(
        "ready masks not gathered",
        DECODER,
        "            return ready if segment.col is None else ops.gather_mask(ready, segment.col, segment.valid)\n",
        "            return run.ready[kind][:, :, -segment.n_slots :, -segment.n_slots :]\n",
    ),
    Mutant(
        "window counted in slots",
        SIGNALS,
        "        columns = segment.columns\n",
        "        columns = torch.arange(segment.columns.shape[1]).expand_as(segment.columns)\n",
    ),
    Mutant(
        "hidden states not gathered behind a decoder stage: the cache stays full",
        DECODER,
        "            hidden = self._gather(run, segment, hidden, index)\n",
        "            self._gather(run, segment, hidden, index)\n",
    ),
    Mutant(
        "nothing gathered before the language model: the cache stays full",
        DECODER,
        "        segment = tokens.begin_segment(0)\n",
        "        tokens.alive = None\n        tokens.counts = [tokens.length] * tokens.batch\n"
        "        segment = tokens.begin_segment(0)\n",
    ),
    Mutant(
        "rope not gathered in the decoder",
        DECODER,
        "[index] + [segment.index] * (len(moved) - 1)",
        "[index] + [torch.arange(index.shape[1]).expand_as(index)] * (len(moved) - 1)",
    ),
    Mutant(
        "rope not gathered in packed encoders",
        "integrations/towers.py",
        "adapted(t, lambda t: t[rows])",
        "adapted(t, lambda t: t[: len(rows)])",
    ),
    Mutant(
        "rope not gathered in encoders alone",
        "integrations/towers.py",
        "rectangle([rows[alive] for alive in encoding.alive])",
        "rectangle([rows[: len(alive)] for alive in encoding.alive])",
    ),
    Mutant(
        "segment borders of packed encoders not moved",
        "integrations/towers.py",
        'adapted(kwargs["cu_seqlens"], moved)',
        'kwargs["cu_seqlens"].clamp(max=len(rows))',
    ),
    Mutant(
        "indices of the wrong sample",
        "vtprune/selection.py",
        "        return tuple(row[:k] for row, k in zip(names.gather(1, self.padded), self.counts, strict=True))\n",
        "        return tuple(row[:k] for row, k in zip(names.gather(1, self.padded.flip(0)), self.counts, strict=True))\n",
    ),
    Mutant(
        "what a selection drops counted from its end",
        "vtprune/selection.py",
        "        return tuple(row[: n - k] for row",
        "        return tuple(row[k:] for row",
    ),
    Mutant(
        "ragged selections filled up with token 0",
        "vtprune/selection.py",
        "        return torch.where(index < 0, index[:, :1], index)\n",
        "        return index.clamp(min=0)\n",
    ),
    Mutant(
        "signals of all pictures for some",
        "integrations/base.py",
        "[u.number for u in units] == list(range(len(values)))",
        "len(units) <= len(values)",
    ),
    Mutant(
        "received attention of the decoder not causal",
        SIGNALS,
        "segment.valid, causal=True",
        "segment.valid, causal=False",
    ),
    Mutant(
        "windows of packed encoders in each other's places",
        TOWERS,
        "per_patch[:, index] = received.transpose(0, 1)",
        "per_patch[:, index.flip(0)] = received.transpose(0, 1)",
    ),
    Mutant(
        "signals of the wrong sample",
        SIGNALS,
        "lambda image, slots: rows[image.row][:, slots].transpose(0, 1)\n",
        "lambda image, slots: rows[0][:, slots].transpose(0, 1)\n",
    ),
    Mutant(
        "merged weights not normalised",
        "kernels/reference.py",
        "    weighted = x.to(acc) * weight.to(acc).unsqueeze(-1)\n",
        "    weighted = x.to(acc)\n",
    ),
    Mutant(
        "merged features not written back",
        DECODER,
        "                hidden = hidden.index_put(flat(places, hidden.device), torch.cat(values))\n",
        "                pass\n",
    ),
    Mutant(
        "hooks left behind",
        "vtprune/engine/journal.py",
        "        self._undo.append(handle.remove)\n",
        "        self._undo.append(lambda: None)\n",
    ),
    Mutant(
        "wrapped methods left behind",
        "vtprune/engine/journal.py",
        "                delattr(owner, name)\n",
        "                pass\n",
    ),
    Mutant(
        "cache counts physical slots",
        "vtprune/engine/cache.py",
        "        return self.vtprune.logical\n",
        "        return physical_length(self, layer_idx)\n",
    ),
    Mutant(
        "beam search does not reorder the validity of slots",
        "vtprune/engine/cache.py",
        "        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))\n",
        "        self._each(lambda t: t.flip(0))\n",
    ),
    Mutant(
        "deepstack features of the wrong tokens",
        DECODER,
        "features[rank.gather(1, col)[survives].to(features.device)]",
        "features[: int(survives.sum())]",
    ),
    Mutant(
        "tiles in the wrong place",
        "integrations/llava_next.py",
        "n + rows * width + cols, source, nearest))",
        "n + rows * (width - 1) + cols, source, nearest))",
    ),
    Mutant(
        "newline tokens removed with content",
        "integrations/llava_next.py",
        "        grid = cells.view(-1, width, 3)[:, :-1, :2]  # without the newline that ends each row\n",
        "        grid = cells.view(-1, width, 3)[:, :, :2]\n",
    ),
    Mutant(
        "logits not put at the caller's columns",
        SEQUENCE,
        "        rank = self.alive.cumsum(1) - 1\n",
        "        rank = self.alive.cumsum(1) * 0 + torch.arange(self.length, device=self.device)\n"
        "        rank = rank.clamp(max=self.now.n_slots - 1)\n",
    ),
    Mutant(
        "decisions not repeated without a cache",
        "vtprune/engine/prompt.py",
        "        if memo is None or not grown or",
        "        if True or not grown or",
    ),
    Mutant(
        "silent where nothing was removed",
        "vtprune/engine/deciding.py",
        "    if stage.must_prune and demanded and not removed:\n",
        "    if False:\n",
    ),
    Mutant(
        "lost hooks not noticed",
        "vtprune/engine/journal.py",
        "        if gone:\n",
        "        if False:\n",
    ),
    Mutant(
        "bypassed tokens at the positions of the first ones",
        BYPASS,
        "gather_tables(tables, index)",
        "gather_tables(tables, torch.arange(index.shape[1]).expand_as(index))",
    ),
    Mutant(
        "bypass with the mask of the first tokens",
        BYPASS,
        "            return ops.gather_mask(mask, chosen.index, chosen.real)\n",
        "            return mask[:, :, : chosen.index.shape[1], : chosen.index.shape[1]]\n",
    ),
    Mutant(
        "fillers of a bypass written back",
        BYPASS,
        "            if chosen.real is not None:\n                out =",
        "            if False:\n                out =",
    ),
    Mutant(
        "fillers of a bypass seen",
        BYPASS,
        "            return ops.gather_mask(mask, chosen.index, chosen.real)\n",
        "            return ops.gather_mask(mask, chosen.index, None)\n",
    ),
    Mutant(
        "bypass in evaluation",
        BYPASS,
        "for layer in self.bypasses if self.decoder.layers[layer].training}",
        "for layer in self.bypasses}",
    ),
    Mutant(
        "bypass under generate",
        BYPASS,
        "            self.local.generating = True\n",
        "            self.local.generating = False\n",
    ),
    Mutant(
        "one draw for all bypassed layers",
        "vtprune/methods/random_ltd.py",
        "{self.first_step + view.step} {view.layer}",
        "{self.first_step + view.step}",
    ),
    Mutant(
        "a failed call counts as a training step",
        BYPASS,
        "        if output is None:\n            return\n",
        "        if output is None:\n            self.step += now is not None\n            return\n",
    ),
    Mutant(
        "recorders see the part of a bypass",
        BYPASS,
        "self._after(layer), first=True)",
        "self._after(layer))",
    ),
    Mutant(
        "a clip of one frame is a picture",
        TOWERS,
        "call.modality if call is not None else",
        "call.modality if call is not None and t > 1 else",
    ),
    Mutant(
        "a clip of Qwen3-VL is a picture",
        ENCODER,
        '            if getattr(self.local, "call", None) is not None:\n',
        "            if False:\n",
    ),
    Mutant(
        "clips of a batch are taken for one",
        "vtprune/methods/clips.py",
        "(one.modality, one.image, one.tile)",
        "(one.modality, 0, one.tile)",
    ),
    Mutant(
        "frames take up tokens of other clips",
        "vtprune/scoring.py",
        "tuple(images[p][s] for s in own[p][i])",
        "tuple(own[p][i])",
    ),
    Mutant(
        "positions of the caller are ignored",
        DECODER,
        'run.tokens.set_positions(kwargs.get("position_ids"), self.decoder.mrope)',
        "run.tokens.set_positions(None, self.decoder.mrope)",
    ),
    Mutant(
        "packed sequences see each other",
        DECODER,
        "cache is None and self._packed(module, kwargs)",
        "cache is None and run is None",
    ),
    Mutant(
        "replaced modules not noticed",
        "vtprune/engine/journal.py",
        "        if moved:\n",
        "        if False:\n",
    ),
    Mutant(
        "compiled code not noticed",
        "vtprune/engine/journal.py",
        "lambda: None)():\n",
        "lambda: None)() and False:\n",
    ),
    Mutant(
        "copies of encoder outputs not labelled",
        DECODER,
        "        self.encoder.relabel(frame.features.values())\n",
        "",
    ),
    Mutant(
        "original llava: tiles in the wrong place",
        "integrations/llava_original.py",
        "n + row * width + col",
        "n + row * (width - 1) + col",
    ),
    Mutant(
        "original llava: tiles show other tokens",
        "integrations/llava_original.py",
        "shown[0] * side + shown[1]",
        "shown[1] * side + shown[0]",
    ),
)


def run(mutant: Mutant, source: Path, workers: str) -> tuple[bool, str]:
    """Whether a mutant was caught, and by which test."""
    path = source / mutant.path
    whole = path.read_text()
    if whole.count(mutant.text) != 1:
        return (
            False,
            f"its text occurs {whole.count(mutant.text)} times in {mutant.path}; update tests/mutants.py",
        )
    path.write_text(whole.replace(mutant.text, mutant.fault))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            workers,
            *TESTS,
        ]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        path.write_text(whole)
    # Parallel runs that stop at the first failure end with 2, others with 1; errors of collection do not count.
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if failed:
        return True, failed[0].removeprefix("FAILED ")
    return False, "no test failed" if done.returncode == 0 else f"pytest ended with {done.returncode}"


def main() -> int:
    """Runs mutants and prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("-n", dest="workers", default="2", help="parallel workers (default 2)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {m.name for m in MUTANTS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --list")
    chosen = [m for m in MUTANTS if not arguments.names or m.name in arguments.names]
    if arguments.list:
        print("\n".join(m.name for m in chosen))
        return 0
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
        )
        shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
        for mutant in chosen:
            start = time.monotonic()
            caught, by = run(mutant, source, arguments.workers)
            survivors += not caught
            word = "caught  " if caught else "SURVIVED"
            print(f"{word} {mutant.name} ({time.monotonic() - start:.0f} s): {by}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

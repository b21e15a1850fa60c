"""Pruned against unpruned vLLM: python tests/in_vllm/bench.py [--model DIR | --random] [--method vtc-cls] [--keep 36].

Both are started by `vllm serve`, one after the other, and asked through the OpenAI client by 1, 8 and 32 threads at a time.
Every request has a picture of its own, so that no cache answers; every answer has the same length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import llava_wide
from server import Answer, Server

from vtprune.eval.world import Example, examples, reference_dir

LEVELS = (1, 8, 32)
EAGER = (
    "--distributed-executor-backend=uni",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=1024",
    "--block-size=32",
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: which engine.
        together: requests at a time.
        per_second: requests answered per second.
        blocks: blocks of the KV cache that a request takes, the most that was seen.
        first: median seconds until the first token.
        prompt: mean tokens of a prompt.
    """

    name: str
    together: int
    per_second: float
    blocks: float
    first: float
    prompt: float


class Watch(threading.Thread):
    """Reads the server's gauges while it works; `blocks` is the most blocks per running request."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.blocks, self.over = server, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            seen = self.server.metrics()
            running = seen.get("vllm:num_requests_running", 0)
            if running:
                # One block is vLLM's own.
                used = seen["vllm:kv_cache_usage_perc"] * (seen["num_gpu_blocks"] - 1)
                self.blocks = max(self.blocks, used / running)


def measure(server: Server, name: str, together: int, items: list[Example], tokens: int) -> Row:
    """Answers all items, `together` at a time."""
    client = server.client()

    def ask(item: Example) -> Answer:
        return server.ask(client, item.question, [item.image], tokens, ignore_eos=True)

    watch = Watch(server)
    watch.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(together) as pool:
        answers = list(pool.map(ask, items))
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    return Row(
        name,
        together,
        len(items) / seconds,
        watch.blocks,
        statistics.median(a.first for a in answers),
        statistics.fmean(a.prompt_tokens for a in answers),
    )


def table(rows: list[Row]) -> str:
    """A table in Markdown."""
    lines = [
        "| engine | requests at a time | requests per second | KV blocks per request | time to first token, ms | prompt tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.together} | {r.per_second:.2f} | {r.blocks:.1f} | {r.first * 1000:.0f} | {r.prompt:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def compare(
    folder: Path, settings: dict[str, Any], requests: int, tokens: int, options: list[str]
) -> list[Row]:
    """Rows of stock vLLM and of pruned vLLM, in this order."""
    per_kind = -(-(sum(max(requests, 2 * n) for n in LEVELS) + 4) // 6)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, asked in (("vLLM", None), (f"vLLM + vtprune {json.dumps(settings)}", settings)):
            items = examples("test", per_kind)
            with Server(folder, asked, Path(scratch) / "log", *options) as server:
                client = server.client()
                for _ in range(4):
                    item = items.pop()
                    server.ask(client, item.question, [item.image], tokens)
                for together in LEVELS:
                    count = max(requests, 2 * together)
                    some, items = items[:count], items[count:]
                    rows.append(measure(server, name, together, some, tokens))
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=reference_dir("llava"), help="checkpoint (default: the reference LLaVA)"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help="a larger LLaVA with random weights instead: 576 tokens per picture; its answers are noise, its times are not",
    )
    parser.add_argument("--method", default="vtc-cls")
    parser.add_argument("--keep", default="36", help="tokens per picture, or a ratio with a point")
    parser.add_argument(
        "--requests", type=int, default=64, help="requests per level, at least two per thread"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens of every answer")
    parser.add_argument("serve", nargs="*", help="after --: further arguments of vllm serve")
    given = parser.parse_args()
    keep = float(given.keep) if "." in given.keep else int(given.keep)
    options = given.serve or EAGER
    options = [*options, "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = llava_wide(Path(scratch)) if given.random else given.model
        rows = compare(folder, {"method": given.method, "keep": keep}, given.requests, given.tokens, options)
    import torch
    import transformers
    import vllm

    print(table(rows))
    print(
        f"\nvllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; {os.cpu_count()} cores, {platform.machine()}; vllm serve {' '.join(options)}"
    )


if __name__ == "__main__":
    main()

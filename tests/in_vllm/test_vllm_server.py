"""`vllm serve` over HTTP: the answers and prompt lengths of the transformers path, at 1, 8 and 32 requests at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed; `bash .ci/vllm` makes an environment for these tests"
)

from in_vllm.engines import Reference
from in_vllm.server import Answer, Server

from vtprune import methods
from vtprune.eval.world import Example, examples, reference_dir

FOLDER = reference_dir("llava")
OPTIONS = (
    "--distributed-executor-backend",
    "uni",
    "--enforce-eager",
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--block-size",
    "32",
)
ITEMS = examples("test", 6)[:32]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"method": "vtc-cls", "keep": 36}
    with Server(FOLDER, settings, tmp_path_factory.mktemp("server") / "log", *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, int]]:
    """Answers and prompt lengths of transformers, pruned to 36 of 144 tokens."""
    reference = Reference(FOLDER)
    method = methods.create("vtc-cls", keep=36, positions="dense")
    found = []
    for item in ITEMS:
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        text = reference.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        answer = reference.answer(text, [item.image], method)
        length = reference.inputs(text, [item.image])["input_ids"].shape[1] - 144 + 36
        found.append((reference.processor.decode(answer, skip_special_tokens=True), length))
    return found


@pytest.mark.parametrize("together", [1, 8, 32])
def test_answers_and_prompt_lengths(server: Server, expected: list[tuple[str, int]], together: int) -> None:
    client = server.client()

    def ask(item: Example) -> Answer:
        return server.ask(client, item.question, [item.image])

    with ThreadPoolExecutor(together) as pool:
        answers = list(pool.map(ask, ITEMS))
    assert [(a.text.strip(), a.prompt_tokens) for a in answers] == [(text.strip(), n) for text, n in expected]


def test_more_pictures_than_allowed_leave_the_server_alive(
    server: Server, expected: list[tuple[str, int]]
) -> None:
    client = server.client()
    with pytest.raises(Exception, match="image"):
        server.ask(client, ITEMS[0].question, [ITEMS[0].image] * 2000)
    assert server.ask(client, ITEMS[0].question, [ITEMS[0].image]).text.strip() == expected[0][0].strip()


def test_a_wrong_count_ends_the_start_with_the_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("wrong") / "log"
    with (
        pytest.raises(RuntimeError, match="keep=200 would remove nothing"),
        Server(FOLDER, {"method": "vtc-cls", "keep": 200}, log, *OPTIONS),
    ):
        pytest.fail("the server started")

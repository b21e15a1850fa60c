"""Pipelines, chat templates, streamers and drafts of transformers with a patched model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer, pipeline
from users.common import (
    KEEP,
    TOKENS,
    answers,
    chat,
    cut,
    hooks,
    inputs_of,
    kept,
    load,
    processor,
    prompt,
    questions,
)

import vtprune

METHODS = ("vtc-cls", "fastv")


@pytest.fixture(scope="module")
def model() -> Any:
    return load()


@pytest.fixture(scope="module")
def pipe(model: Any) -> Any:
    """Made before any patch."""
    return pipeline("image-text-to-text", model=model, processor=processor())


@pytest.fixture(params=METHODS)
def patch(model: Any, request: pytest.FixtureRequest) -> Iterator[vtprune.Patch]:
    with vtprune.patch(model, request.param, keep=KEEP) as patch:
        yield patch


def texts(records: list[Any]) -> list[Any]:
    """Generated texts, or conversations, of records, one per question."""
    found = [(r[0] if isinstance(r, list) else r)["generated_text"] for r in records]
    return [t.strip() if isinstance(t, str) else t for t in found]


def expect_pruned(patch: vtprune.Patch, samples: int) -> None:
    report = patch.report()
    assert report.engaged
    assert report.visual_tokens_in == [TOKENS] * samples
    assert report.visual_tokens_out == [KEEP] * samples


def test_pictures_and_text(pipe: Any, model: Any, patch: vtprune.Patch) -> None:
    for question in questions()[:3]:
        said = pipe(question.image, text=prompt(question), return_full_text=False)
        expect_pruned(patch, 1)
        assert texts(said) == answers(model, inputs_of([question]))


def test_the_answer_is_that_of_the_pruned_sequence(pipe: Any, model: Any) -> None:
    """Its first token, from the stock model on the sequence cut by hand; keeping nearly nothing changes some answers."""
    asked = questions()
    dense = texts(pipe([chat(q) for q in asked], return_full_text=False))
    with vtprune.patch(model, "divprune", keep=2, positions="original") as patch:
        records = [pipe(text=chat(q), return_tensors=True)[0] for q in asked]
        said = texts(pipe([chat(q) for q in asked], return_full_text=False))
        stay = []
        for question in asked:
            pipe(text=chat(question))
            stay += kept(patch.report())
    assert said != dense
    for question, record, left in zip(asked, records, stay, strict=True):
        inputs = inputs_of([question])
        first = record["generated_token_ids"][inputs["input_ids"].shape[1]]
        assert cut(model, inputs, 0, left)[-1].argmax() == first


def test_batches_of_conversations(pipe: Any, model: Any, patch: vtprune.Patch) -> None:
    asked = questions()[:4]
    one_by_one = [texts(pipe(text=chat(q), return_full_text=False))[0] for q in asked]
    assert one_by_one == [answers(model, inputs_of([q]))[0] for q in asked]
    for size in (1, 2, 4):
        assert texts(pipe([chat(q) for q in asked], batch_size=size, return_full_text=False)) == one_by_one
        expect_pruned(patch, size)


def test_lists_of_pictures_and_texts(pipe: Any, model: Any, patch: vtprune.Patch) -> None:
    asked = questions()[:3]
    said = pipe([q.image for q in asked], text=[prompt(q) for q in asked], return_full_text=False)
    expect_pruned(patch, 3)
    assert texts(said) == answers(model, inputs_of(asked))


def test_full_text_and_conversations_that_go_on(pipe: Any, patch: vtprune.Patch) -> None:
    question = questions()[0]
    new = texts(pipe(text=chat(question), return_full_text=False))[0]
    whole = texts(pipe(text=chat(question)))[0]
    assert whole[-1]["role"] == "assistant"
    assert whole[-1]["content"].strip() == new
    # The answer so far, and one more picture.
    second = questions()[1]
    said = pipe(
        text=[
            *chat(question),
            {"role": "assistant", "content": [{"type": "text", "text": new}]},
            *chat(second),
        ]
    )
    assert patch.report().visual_tokens_out == [2 * KEEP]
    assert len(texts(said)[0]) == 4


def test_generation_options(pipe: Any, model: Any, patch: vtprune.Patch) -> None:
    question = questions()[0]
    inputs = inputs_of([question])
    for options in ({"num_beams": 3, "max_new_tokens": 5}, {"min_new_tokens": 4, "max_new_tokens": 4}):
        said = pipe(
            text=chat(question), return_full_text=False, generate_kwargs={"do_sample": False, **options}
        )
        assert texts(said) == answers(model, inputs, **options)
    several = pipe(
        text=chat(question),
        return_tensors=True,
        generate_kwargs={"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3},
    )
    tokens = model.generate(**inputs, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    assert all(torch.equal(r["generated_token_ids"], t) for r, t in zip(several, tokens, strict=True))
    assert patch.report().visual_tokens_out == [KEEP] * 2


def test_a_pipeline_made_from_a_patched_model(model: Any, patch: vtprune.Patch) -> None:
    asked = questions()[:2]
    late = pipeline("image-text-to-text", model=model, processor=processor())
    said = texts(late([chat(q) for q in asked], batch_size=2, return_full_text=False))
    expect_pruned(patch, 2)
    assert said == answers(model, inputs_of(asked))


def test_removal_gives_the_pipeline_back(pipe: Any, model: Any) -> None:
    asked = [chat(q) for q in questions()]
    before, count = texts(pipe(asked, return_full_text=False)), hooks(model)
    with vtprune.patch(model, "fastv", keep=1):
        assert texts(pipe(asked, return_full_text=False)) != before
    assert texts(pipe(asked, return_full_text=False)) == before
    assert hooks(model) == count


def test_text_alone(pipe: Any, patch: vtprune.Patch) -> None:
    said = pipe(text="USER: how many ? ASSISTANT:", return_full_text=False)
    report = patch.report()
    assert not report.engaged
    patch.remove()
    assert pipe(text="USER: how many ? ASSISTANT:", return_full_text=False) == said


def test_chat_templates(model: Any, patch: vtprune.Patch) -> None:
    """The processor's template gives tensors that go straight into the model."""
    asked = questions()[:3]
    inputs = processor().apply_chat_template(
        [chat(q) for q in asked],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    said = answers(model, inputs)
    expect_pruned(patch, 3)
    assert said == answers(model, inputs_of(asked))


def streamed(model: Any, inputs: dict[str, Any], **options: Any) -> list[str]:
    """Pieces of an answer as they arrive here, while another thread generates."""
    streamer = TextIteratorStreamer(
        processor().tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**inputs, streamer=streamer, max_new_tokens=8, do_sample=False, **options)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work)
    thread.start()
    pieces = list(streamer)
    thread.join(60)
    if failed:
        raise failed[0]
    return pieces


def test_streaming_from_another_thread(model: Any, patch: vtprune.Patch) -> None:
    for question in questions()[:4]:
        inputs = inputs_of([question])
        expected = answers(model, inputs)
        pieces = streamed(model, inputs)
        assert "".join(pieces).strip() == expected[0]
        expect_pruned(patch, 1)  # a report is not bound to the thread that made it
    assert len(streamed(model, inputs, min_new_tokens=8)) > 1


def test_streams_at_once(model: Any, patch: vtprune.Patch) -> None:
    """Several threads generate from one patched model, and are read in turn."""
    asked = questions()[:4]
    expected = [answers(model, inputs_of([q]))[0] for q in asked]
    streamers = [
        TextIteratorStreamer(processor().tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
        for _ in asked
    ]
    threads = [
        threading.Thread(
            target=model.generate,
            kwargs={**inputs_of([q]), "streamer": s, "max_new_tokens": 8, "do_sample": False},
        )
        for q, s in zip(asked, streamers, strict=True)
    ]
    for thread in threads:
        thread.start()
    said = ["".join(s).strip() for s in streamers]
    for thread in threads:
        thread.join(60)
    assert said == expected


def test_a_refusal_reaches_the_reader_of_a_stream(model: Any) -> None:
    with vtprune.patch(model, "fastv", keep=KEEP), pytest.raises(vtprune.UnsupportedCallError, match="draft"):
        streamed(model, inputs_of(questions()[:1]), prompt_lookup_num_tokens=3)


def test_printing_as_it_comes(model: Any, patch: vtprune.Patch, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = inputs_of(questions()[:1])
    expected = answers(model, inputs)
    answers(
        model,
        inputs,
        streamer=TextStreamer(processor().tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out.strip() == expected[0]


def test_prompt_lookup_in_a_pipeline(pipe: Any, model: Any) -> None:
    """Drafts from the prompt change nothing where the method does not read it, and are refused where it does."""
    picture = questions()[0].image
    # Stock code fails where a draft holds the placeholder, so that what repeats must stand behind it.
    text = "<image>\nwhat is at the top left? what is at the top"
    drafts = {"prompt_lookup_num_tokens": 3, "do_sample": False, "max_new_tokens": 8}
    with vtprune.patch(model, "vtc-cls", keep=KEEP) as patch:
        plain = pipe(picture, text=text, return_full_text=False, max_new_tokens=8)
        calls = patch.report().decode_steps
        assert pipe(picture, text=text, return_full_text=False, generate_kwargs=drafts) == plain
        assert patch.report().visual_tokens_out == [KEEP]
        assert patch.report().decode_steps != calls
    with vtprune.patch(model, "fastv", keep=KEEP), pytest.raises(vtprune.UnsupportedCallError, match="draft"):
        pipe(picture, text=text, generate_kwargs=drafts)
